# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One script per claim of the README; each prints a table and writes JSON. See README.md here."""
