# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Five steps of AdamW in one process, under DDP and under FSDP2: losses and adapters are the same. Run by `test_fsdp2.py` on
two and four processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from peft_ext import AlphaTuningConfig, PeqaConfig
from tests.distributed.ranks import group, rank, rows, shard, world
from tests.tiny.models import tiny


CONFIGS = {
    "per channel": lambda: PeqaConfig(bits=4),
    "group-wise": lambda: PeqaConfig(bits=3, group_size=8),
    "zero points": lambda: PeqaConfig(bits=4, group_size=8, zero="float", trained="scales+zeros"),
    "binary": lambda: AlphaTuningConfig(bits=3),
}
STEPS, BATCH = 5, 8


def train(model: nn.Module, parts: int, part: int) -> list[float]:
    """The mean loss over all parts at each step; `part` of `parts` equal parts of each batch is this process's."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        ids = rows(BATCH, seed=step).chunk(parts)[part]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if parts > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / parts)
    return losses


def main() -> None:
    for name, config in CONFIGS.items():
        alone, sharded, whole = (get_peft_model(tiny("llama"), config()).train() for _ in range(3))
        expected = train(alone, 1, 0)
        assert expected[-1] != expected[0]
        found = train(shard(sharded), world(), rank())
        spread = DistributedDataParallel(whole)
        of_ddp = train(spread, world(), rank())
        for losses in (found, of_ddp):
            assert max(abs(one - other) for one, other in zip(expected, losses)) < 1e-5, (name, expected, losses)
        options = StateDictOptions(full_state_dict=True)
        gathered = get_peft_model_state_dict(sharded, state_dict=get_model_state_dict(sharded, options=options))
        for adapter in (gathered, get_peft_model_state_dict(whole)):
            for key, tensor in get_peft_model_state_dict(alone).items():
                torch.testing.assert_close(adapter[key], tensor, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")
        del spread


if __name__ == "__main__":
    with group():
        main()
