# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Half precision, casts and moves of the whole model, the meta device, `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import nn

from tests.cases import CASES, adapter_parameters, assert_differs, assert_same, move_adapter, over, train
from tests.tiny.models import logits_of


HALVES = [torch.float16, torch.bfloat16]
FEW_NAMES = ("peqa-llama-3bit-groups", "peqa-gpt2-4bit", "peqa-mlp-4bit", "alphatuning-gpt2-4bit", "bottleneck-llama")
FEW = [case for case in CASES if case.name in FEW_NAMES]
few_cases = over(FEW)
# Tracing takes seconds; the tuner layers of larger models are the same.
COMPILED_NAMES = (
    "peqa-mlp-4bit",
    "peqa-mlp-groups-head",
    "peqa-neox-regex",
    "alphatuning-mlp-1bit-head",
    "bottleneck-mlp-head",
)
COMPILED = [case for case in CASES if case.name in COMPILED_NAMES]


def _half(batch: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def _logits(case, model, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, _half(case.inputs(), dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapter", "half-adapter"])
def test_half_precision_base(case, dtype, autocast):
    torch.manual_seed(0)
    model = get_peft_model(case.float_model(dtype), case.config(), autocast_adapter_dtype=autocast).eval()
    move_adapter(model, strength=case.strength)
    expected = torch.float32 if autocast else dtype
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {expected}
    before = _logits(case, model, dtype)
    assert before.dtype == dtype and torch.isfinite(before).all()
    torch.manual_seed(0)
    reference = get_peft_model(case.float_model(dtype).float(), case.config()).eval()  # from the same rounded weights
    move_adapter(reference, strength=case.strength)
    assert_same(before, case.logits(reference), tolerance=0.1)
    for safe_merge in (False, True) if case.merges else ():
        model.merge_adapter(safe_merge=safe_merge)
        assert_same(_logits(case, model, dtype), before, tolerance=0.1)
        model.unmerge_adapter()
        assert torch.equal(_logits(case, model, dtype), before)
    if case.merges:
        assert_same(_logits(case, model.merge_and_unload(), dtype), before, tolerance=0.1)


@few_cases
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_casting_the_whole_model(case, dtype):
    model = case.moved()
    before = case.logits(model)
    codes = {key: value.clone() for key, value in model.state_dict().items() if not value.is_floating_point()}
    model = model.to(dtype)
    after = _logits(case, model, dtype)
    assert after.dtype == dtype
    assert_same(after, before, tolerance=0.2)
    for key, value in codes.items():
        assert torch.equal(model.state_dict()[key], value), key
    back = model.float()
    assert_same(case.logits(back), before, tolerance=0.2)


@few_cases
def test_half_float_and_bfloat16_methods(case):
    model = case.moved()
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
        model = getattr(model, name)()
        assert _logits(case, model, dtype).dtype == dtype


@few_cases
def test_saving_in_half_precision_and_loading_in_float(case, tmp_path):
    """A half-precision base has other codes than a float32 one only if its weights differ; here they are rounded
    first."""
    rounded = case.float_model(torch.bfloat16)
    model = get_peft_model(rounded, case.config()).eval()
    move_adapter(model, strength=case.strength)
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(case.float_model(torch.bfloat16), tmp_path)
    assert_same(_logits(case, restored, torch.bfloat16), _logits(case, model, torch.bfloat16), tolerance=1e-3)
    upcast = PeftModel.from_pretrained(case.float_model(torch.bfloat16).float(), tmp_path)
    assert_same(case.logits(upcast), _logits(case, model, torch.bfloat16), tolerance=0.1)


@few_cases
def test_a_whole_model_on_the_meta_device(case):
    """Inject into a skeleton, load everything after: as FSDP and big-model loading do it."""
    source = case.moved()
    with torch.device("meta"):
        model = get_peft_model(case.float_model().to("meta"), case.config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.load_state_dict(source.state_dict(), assign=True)
    for name, buffer in source.named_buffers():  # rotary tables aren't part of a state dict
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    if hasattr(source, "tie_weights"):
        model.base_model.model.tie_weights()  # assigning unties
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same(case.logits(model.eval()), case.logits(source))
    trainable = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, _ in trainable] == list(adapter_parameters(model))
    assert model.get_nb_trainable_parameters() == source.get_nb_trainable_parameters()


@few_cases
def test_adapters_made_on_the_meta_device_cannot_be_used_before_they_are_loaded(case):
    model = get_peft_model(case.float_model(), case.config(), low_cpu_mem_usage=True).eval()
    with pytest.raises((NotImplementedError, RuntimeError)):
        case.logits(model)
    set_peft_model_state_dict(model, get_peft_model_state_dict(case.moved()), low_cpu_mem_usage=True)
    assert_same(case.logits(model), case.logits(case.moved()))


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@over(COMPILED)
def test_compile(case, _fresh_compiler, tmp_path):
    """One graph without breaks; a hot swap needs no second one."""
    model = case.with_two_adapters()
    other = case.with_two_adapters()
    other.set_adapter("other")
    other.save_pretrained(tmp_path)
    first, second = case.logits(model), case.logits(other)
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=case.model == "mlp")
    assert_same(case.logits(compiled), first)
    with torch.compiler.set_stance("fail_on_recompile"):
        model.load_adapter(tmp_path / "other", adapter_name="default")
        assert_same(case.logits(compiled), second)
    with model.disable_adapter():
        disabled = case.logits(compiled)
    assert_differs(disabled, second)
    assert_same(case.logits(compiled), second)


@over(COMPILED[1:])
def test_training_a_compiled_model(case, _fresh_compiler):
    model, reference = case.moved(), case.moved()
    model.base_model.model.drop = reference.base_model.model.drop = nn.Identity()
    expected = train(reference, case.inputs(), steps=3)
    compiled = torch.compile(model, backend="aot_eager")
    losses = train(compiled, case.inputs(), steps=3)
    assert losses == pytest.approx(expected, rel=1e-3)
    for name, parameter in adapter_parameters(reference).items():
        assert_same(adapter_parameters(model)[name].data, parameter.data, tolerance=1e-2)
