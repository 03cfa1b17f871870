# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.in_context`, see `cli.py`."""

from generation_ext.in_context.cli import main


if __name__ == "__main__":
    main()
