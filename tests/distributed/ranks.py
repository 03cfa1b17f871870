# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the scripts in this folder share: gloo processes, models sharded by FSDP2, and the codes that a process has."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peft_ext.quant.conversion import packed_layers
from tests.tiny.models import VOCAB


def rank() -> int:
    return int(os.environ["RANK"])


def world() -> int:
    return int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def group() -> Iterator[None]:
    """A gloo group, which is left before the process ends."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    yield
    dist.barrier()
    dist.destroy_process_group()


def shard(model: nn.Module) -> nn.Module:
    """By FSDP2, a block at a time, as accelerate does; the codes are seen to lie in pieces."""
    mesh = init_device_mesh("cpu", (world(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_sharded(model)
    return model


def check_sharded(model: nn.Module) -> None:
    layers = packed_layers(model)
    assert layers
    for name, layer in layers.items():
        planes = layer.planes
        assert isinstance(planes, DTensor), f"{name}: codes are {type(planes).__name__}"
        tiles = planes.shape[0]
        assert planes.to_local().shape[0] <= -(-tiles // world()), (
            f"{name}: {planes.to_local().shape} of {planes.shape}"
        )


def rows(count: int, seed: int = 0, length: int = 8) -> torch.Tensor:
    """int64 `[count, length]`, the same in all processes."""
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: torch.Tensor, **kwargs) -> float:
    with torch.no_grad():
        return model(input_ids=ids, labels=ids, **kwargs).loss.item()


def refusal(call, *words: str) -> None:
    """`call()` has to raise a ValueError that has these words."""
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"no ValueError about {words}")
