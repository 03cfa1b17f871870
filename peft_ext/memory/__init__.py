# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Memory of tuning and serving a model, found from its config alone: the work is done on the meta device."""
