# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Under FSDP2, what each operation on adapters makes the forward pass compute, against one process. Run by `test_fsdp2.py`."""

from __future__ import annotations

import sys

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peft_ext import AlphaTuningConfig, PeqaConfig
from tests.distributed.ranks import group, loss_of, refusal, rows, shard
from tests.tiny.models import tiny


CONFIGS = {
    "peqa": lambda: PeqaConfig(bits=4, init_weights=False),
    "group_wise": lambda: PeqaConfig(bits=3, group_size=8, init_weights=False),
    "zeros": lambda: PeqaConfig(bits=4, zero="float", trained="scales+zeros", init_weights=False),
    "alphatuning": lambda: AlphaTuningConfig(bits=3, init_weights=False),
}
IDS = rows(4, seed=9)


def _model(kind: str):
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), CONFIGS[kind]())
    model.add_adapter("other", CONFIGS[kind]())
    return model.eval()


def check(kind: str) -> None:
    one, sharded = _model(kind), shard(_model(kind))
    both = (one, sharded)

    def same() -> float:
        found = [loss_of(model, IDS) for model in both]
        assert abs(found[0] - found[1]) < 1e-6, found
        return found[0]

    assert one.get_nb_trainable_parameters() == sharded.get_nb_trainable_parameters()
    tuned = same()
    with one.disable_adapter(), sharded.disable_adapter():
        base = same()
    assert abs(base - tuned) > 1e-4
    for model in both:
        model.merge_adapter()
    assert abs(same() - tuned) < 1e-5
    same()  # gathered anew
    with sharded.disable_adapter():  # doesn't write in a forward
        assert abs(loss_of(sharded, IDS) - base) < 1e-6
    one_more = [loss_of(sharded, IDS)]
    assert abs(one_more[0] - tuned) < 1e-5
    refusal(sharded.merge_and_unload, "FSDP", "one process")
    refusal(sharded.unload, "FSDP", "one process")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    whole = get_model_state_dict(sharded, options=options)
    refusal(lambda: get_peft_model_state_dict(sharded, state_dict=whole), "unmerge_adapter()")
    for model in both:
        model.unmerge_adapter()
    assert same() == tuned
    whole = get_model_state_dict(sharded, options=options)
    expected, found = get_peft_model_state_dict(one), get_peft_model_state_dict(sharded, state_dict=whole)
    assert set(expected) == set(found) and all(torch.equal(expected[key], found[key]) for key in expected)
    for model in both:
        model.set_adapter("other")
    assert abs(same() - tuned) > 1e-5
    for model in both:
        model.merge_adapter(["default", "other"])
    same()
    for model in both:
        model.set_adapter("default")  # unmerges
    assert same() == tuned
    names = ["default", "other", "__base__", "default"]
    mixed = [loss_of(model, IDS, adapter_names=names) for model in both]
    assert abs(mixed[0] - mixed[1]) < 1e-6


def check_zero_points_of_integers() -> None:
    """Float zero points can't take integers' place in pieces; nothing is left half merged."""
    sharded = _model("zeros")
    for module in sharded.modules():
        if type(module).__name__ == "PackedLinear":
            module.zero_point = torch.nn.Parameter(
                module.zero_point.detach().round().to(torch.uint8), requires_grad=False
            )
    shard(sharded)
    before = loss_of(sharded, IDS)
    refusal(sharded.merge_adapter, "zero points", "one process")
    assert loss_of(sharded, IDS) == before


def check_gathered_at_the_moment() -> None:
    """The outermost module stays gathered after a forward by default: what is written then would be lost."""
    from torch.distributed.device_mesh import init_device_mesh

    model = fully_shard(_model("peqa"), mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    tuned = loss_of(model, IDS)
    layer = next(module for module in model.modules() if type(module).__name__ == "PackedLinear")
    assert not isinstance(layer.planes, DTensor)
    refusal(model.merge_adapter, "model.reshard()")
    model.reshard()
    model.merge_adapter()
    assert abs(loss_of(model, IDS) - tuned) < 1e-5
    refusal(model.unmerge_adapter, "model.reshard()")


if __name__ == "__main__":
    with group():
        for kind in sys.argv[1:] or CONFIGS:
            check(kind)
        check_zero_points_of_integers()
        check_gathered_at_the_moment()
