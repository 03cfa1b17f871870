# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Other people's tools on our models: what works, and whether their figures are ours."""
