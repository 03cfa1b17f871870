# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The life of a packed base and its adapter in one family of models, step by step, and what each step came to.

A step does what it does on Llama, or peft-ext refuses it in words. Anything else, wrong numbers above all, raises.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ext import AdapterPool, PeqaConfig, calibrate, report
from peft_ext.checkpoint.saving import take_over
from peft_ext.models import load
from peft_ext.quant.conversion import packed_layers
from peft_ext.scale_tuning.layer import ScaleTuningLinear
from peft_ext.scale_tuning.report import Report
from tests.tiny import families
from tests.tiny.models import logits_of


TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForImageTextToText": "CAUSAL_LM",
    "AutoModelForSpeechSeq2Seq": None,  # PEFT's models for that task pass token ids to the encoder
}
STEPS = ("inject", "calibrate", "base", "train", "save, load", "merge", "pool", "tune")
YES, REFUSED, NOT_HERE = "yes", "refused", "-"
# Run where peft_ext has never been imported: what stock transformers makes of each base.
STOCK = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for auto_class, folder in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**load_file(folder + "/batch.safetensors"))[0]
    save_file({"logits": logits.contiguous()}, folder + "/stock.safetensors")
assert "peft_ext" not in sys.modules
"""


class Base(NamedTuple):
    """A saved base: its folder, the auto class that loads it, its logits on `batch.safetensors`, its format."""

    folder: Path
    auto_class: str
    logits: torch.Tensor
    stored: str


class Life(NamedTuple):
    """What became of a family.

    `share`: of the weights that are multiplied with (embeddings and what is tied to them aside), how many are packed; `left`:
    which layers stay float, as `report` says it; `steps`: each one's outcome; `words`: those of the refusals.
    """

    share: float
    left: str
    steps: dict[str, str]
    words: list[str]
    bases: list[Base]


def live(name: str, folder: Path) -> Life:
    """Take a family through all steps; files go into `folder`."""
    auto_class = families.FAMILIES[name].auto_class
    batch, labelled = families.batch(name), families.batch(name, labels=True)
    fields = {"bits": 4, "group_size": 16, "task_type": TASKS[auto_class]}
    config = PeqaConfig(**fields, init_method="calibrated")
    steps: dict[str, str] = dict.fromkeys(STEPS, NOT_HERE)
    words: list[str] = []
    bases: list[Base] = []
    idle = 0
    shape: dict[str, Any] = {"share": 0.0, "left": ""}

    @contextlib.contextmanager
    def step(key: str) -> Iterator[None]:
        try:
            yield
            steps[key] = YES
        except (ValueError, TypeError) as error:
            if "/peft_ext/" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            steps[key] = REFUSED
            words.append(str(error))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(model.eval(), batch)

    def save(model: Any, part: str) -> Base:
        model.save_pretrained(folder / part)
        save_file({key: value.contiguous() for key, value in batch.items()}, folder / part / "batch.safetensors")
        method = model.config.quantization_config.quant_method
        bases.append(Base(folder / part, auto_class, logits(model), str(getattr(method, "value", method))))
        return bases[-1]

    def loaded(base: Base, like: set[str]) -> Any:
        model = getattr(transformers, auto_class).from_pretrained(base.folder)
        assert set(packed_layers(model)) == like, "the base that is loaded has other packed layers"
        torch.testing.assert_close(logits(model), base.logits, rtol=1e-4, atol=1e-4)
        return model

    with step("inject"):
        model = get_peft_model(families.build(name), PeqaConfig(**fields, sym=True, init_method="minmax")).unload()
        packed = set(packed_layers(model))
        assert packed
        shape = {"share": _share(model), "left": _counted(report(model))}
        loaded(save(model, "symmetric"), packed)
    if steps["inject"] != YES:
        return Life(**shape, steps=steps, words=words, bases=bases)
    with step("calibrate"):
        model = get_peft_model(calibrate(families.build(name), config, [batch], progressbar=False), config).unload()
        assert set(packed_layers(model)) == packed and torch.isfinite(logits(model)).all()
    with step("base"):
        base = save(model, "base")
        loaded(base, packed)
    with step("train"):
        model = get_peft_model(loaded(base, packed), config).train()
        idle = _train(model, labelled)
        tuned = logits(model)
        assert not torch.allclose(tuned, base.logits, atol=1e-4), "a step of training changed nothing"
    if idle and steps["train"] == YES:
        steps["train"] = f"{YES} ({idle} layers never run)"
    with step("save, load"):
        model.save_pretrained(folder / "adapter")
        again = PeftModel.from_pretrained(loaded(base, packed), folder / "adapter")
        torch.testing.assert_close(logits(again), tuned, rtol=1e-4, atol=1e-4)
        with again.disable_adapter():
            torch.testing.assert_close(logits(again), base.logits, rtol=1e-4, atol=1e-4)
    with step("merge"):
        merged = save(again.merge_and_unload(), "merged")
        torch.testing.assert_close(merged.logits, tuned, rtol=1e-4, atol=1e-4)
        loaded(merged, packed)
    with step("pool"):
        pool = AdapterPool(loaded(base, packed))
        pool.load(folder / "adapter", "tuned")
        pool.activate("tuned")
        torch.testing.assert_close(logits(pool.model), tuned, rtol=1e-4, atol=1e-4)
    if auto_class in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        with step("tune"):
            _as_tune_does(base, folder / "adapter", fields, labelled, tuned, logits)
    return Life(**shape, steps=steps, words=words, bases=bases)


def _train(model: nn.Module, labelled: dict[str, torch.Tensor]) -> int:
    """A step of training, in which every adapter gets a gradient whose layer runs; returns how many don't run at all (in
    Zamba 2, a block that several layers share has parts for each of them)."""
    ran: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, ScaleTuningLinear):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(**labelled).loss.backward()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    without = [key for key, value in trained.items() if value.grad is None]
    assert not [key for key in without if key.partition(".peqa_delta")[0] in ran], f"no gradient: {without}"
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    return len(without)


def check_stock(fresh_process: Any, bases: list[Base]) -> None:
    """Stock transformers makes of the bases in its own format what was saved."""
    theirs = [base for base in bases if base.stored == "compressed-tensors"]
    fresh_process(STOCK, json.dumps([(base.auto_class, str(base.folder)) for base in theirs]))
    for base in theirs:
        found = load_file(base.folder / "stock.safetensors")["logits"]
        torch.testing.assert_close(found, base.logits, rtol=1e-4, atol=1e-4)


def _as_tune_does(base: Base, adapter: Path, fields: dict[str, Any], labelled: Any, tuned: Any, logits: Any) -> None:
    """`peft-ext tune` on the packed folder, up to its trainer, and what `generate` and `eval` load afterwards."""
    model = load(str(base.folder))
    take_over(model)
    model = get_peft_model(model, PeqaConfig(**fields, init_method="minmax")).train()
    _train(model, labelled)
    torch.testing.assert_close(logits(load(str(base.folder), adapter=str(adapter))), tuned, rtol=1e-4, atol=1e-4)


def _share(model: nn.Module) -> float:
    """Packed weights of all that are multiplied with; embeddings and what is tied to them aside."""
    layers = packed_layers(model)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    floats = sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.dim() >= 2 and parameter.is_floating_point() and id(parameter) not in embeddings | inside
    )
    packed = sum(layer.in_features * layer.out_features for layer in layers.values())
    return packed / (packed + floats)


def _counted(found: Report) -> str:
    counts = Counter(part.reason for part in found.left.values())
    return ", ".join(f"{reason} x{count}" if count > 1 else reason for reason, count in counts.items())
