# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Run by torchrun in two processes: trains a critic, and writes what each process ends with.

torchrun --nproc_per_node 2 -m tests.generation_ext.critic.two_processes FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from generation_ext.critic import Critic
from tests.generation_ext.critic.test_training import telling, trainer


def main(folder: Path) -> None:
    """Train, and write the weights and the logged rewards to `<folder>/<process>.json`."""
    model = telling("llama")
    torch.manual_seed(0)
    critic = Critic.for_model(model, action_values=True, lora_rank=2)
    trained = trainer(folder / "run", critic, model, ddp_backend="gloo")
    trained.train()
    result = {
        "weights": {name: value.tolist() for name, value in trained.model.state_dict().items()},
        "reward_mean": [entry["reward_mean"] for entry in trained.state.log_history if "reward_mean" in entry],
        "processes": trained.args.world_size,
    }
    (folder / f"{trained.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
