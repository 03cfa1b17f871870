# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Run by torchrun in two processes: distils from logits on disk, and writes what each process ends with.

torchrun --nproc_per_node 2 -m tests.distillation.two_processes FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.distillation.test_trainer import rows, sft


def trained(folder: Path, **arguments) -> list[float]:
    """Train for two steps; what is trained in the end."""
    torch.manual_seed(0)
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, **arguments}
    trainer = sft(folder / "run", data=rows(masked=True), arguments=options, teacher_logits=folder / "kept", top_k=8)
    trainer.train()
    parts = [each.detach().flatten() for each in trainer.model.parameters() if each.requires_grad]
    return torch.cat(parts).tolist()


def main(folder: Path) -> None:
    """Write the end of this process to `<folder>/<process>.json`."""
    weights = trained(folder, per_device_train_batch_size=2, ddp_backend="gloo")
    result = {"weights": weights, "processes": int(os.environ["WORLD_SIZE"])}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
