# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Attention that infers each token's granularity (Gu et al. 2022): on pretrained models, in one's own, and as C-DNPG."""
