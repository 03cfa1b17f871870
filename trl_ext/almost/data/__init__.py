# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The stages that write data: queries, answers and their comparisons, demonstrations by self-play."""
