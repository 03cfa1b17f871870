#!/usr/bin/env bash
# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
# ALMoST on SmolLM2-135M: the plan of the whole run, which takes three hours of one core without --dry_run.
set -euo pipefail
peft-ext almost --config trl_ext/recipes/smollm2-135m.yaml --run_dir runs/almost --skip evaluation --dry_run
