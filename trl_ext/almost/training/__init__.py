# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The stages that train, on TRL's trainers: reward model, SFT, RLSF."""
