# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Who writes texts: generators and their ranks, backends, and how they are loaded."""
