# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A plain training loop for `accelerate launch`; writes an adapter and a report. Not a test: `test_trainers.py` runs
it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_ext import PeqaConfig
from tests.cases import adapter_parameters
from tests.tiny.models import VOCAB, tiny


def mean_loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=3, group_size=16, task_type="CAUSAL_LM"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = torch.randint(3, VOCAB, (16, 8), generator=torch.Generator().manual_seed(0))
    before = mean_loss(model, rows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4))
    for _ in range(3):
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(model).eval()
    scales = torch.cat([parameter.detach().flatten() for parameter in adapter_parameters(plain).values()])
    gathered = accelerator.gather(scales[None])
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])).logits
    if accelerator.is_main_process:
        plain.save_pretrained(folder / "adapter")
        report = {
            "processes": accelerator.num_processes,
            "mean_loss_before": before,
            "mean_loss_after": mean_loss(plain, rows),
            "codes_unchanged": all(torch.equal(p, frozen[n]) for n, p in plain.named_parameters() if n in frozen),
            "scales_equal_on_all_processes": bool((gathered == gathered[:1]).all()),
            "logits_sum": logits.sum().item(),
        }
        (folder / "report.json").write_text(json.dumps(report))
    # DistributedDataParallel goes before the process group: as the group's last owner it would free it while holding the
    # interpreter's lock, which a thread of gloo may be waiting for (seen as a process that never ends)
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
