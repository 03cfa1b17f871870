# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Work that is killed, and files that are damaged."""

import os


# pyarrow's thread for memory: what runs here forks, and locks that a thread holds stay locked in a fork.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
