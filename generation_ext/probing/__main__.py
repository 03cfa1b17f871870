# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.probing`: `peft-ext probe` by its old name, for one release."""

import sys

from peft_ext.cli import old_name


if __name__ == "__main__":
    sys.exit(old_name("python -m generation_ext.probing", "probe"))
