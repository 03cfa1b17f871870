# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How far vLLM's own code reads what we write, on a machine that can't run vLLM.

Out of an unpacked vLLM wheel, its compressed-tensors code is executed with everything beside it (attention, kernels,
distribution) replaced by stand-ins: the config is parsed, every layer's scheme is chosen under vLLM's fused names
(`qkv_proj`, `gate_up_proj`), its parameters are made and must have the shapes of our tensors, and its reference product
(the one of its batch-invariant mode, with torch's matmul for Triton's) must give our layer's output. Kernels are not run.

    pip download --no-deps --no-binary :none: -d wheels vllm && unzip -q 'wheels/vllm*.whl' 'vllm/*.py' -d unpacked
    PEFT_EXT_VLLM=unpacked python -m benchmarks vllm_reading
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import NotHere, Run
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.tuning import tiny_llama
from peft_ext import PeqaConfig
from peft_ext.quant import kernel
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.kernel import KERNEL_VARIABLE


# What is executed; everything else of vLLM is a stand-in.
REAL = (
    "vllm.scalar_type",
    "vllm.model_executor.parameter",
    "vllm.model_executor.layers.quantization.base_config",
    "vllm.model_executor.layers.quantization.utils.config_utils",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_scheme",
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16",
)
CONFIG, BASE_SCHEME, SCHEME = REAL[4], REAL[6], REAL[7]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FORMATS = {
    "4 bits, groups of 64": {"bits": 4, "group_size": 64},
    "4 bits, groups of 64, symmetric": {"bits": 4, "group_size": 64, "sym": True},
    "4 bits, channels": {"bits": 4},
    "8 bits, groups of 32, symmetric": {"bits": 8, "group_size": 32, "sym": True},
    "3 bits, groups of 64": {"bits": 3, "group_size": 64},
    "2 bits, groups of 32": {"bits": 2, "group_size": 32},
}
TOLERANCE = 1e-4
VLLM_VARIABLE = "PEFT_EXT_VLLM"


class StandIn(types.ModuleType):
    """A module that has any name: a class that takes anything."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__module__": self.__name__})
        setattr(self, name, made)
        return made


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of vLLM: some out of the folder, the rest stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] != "vllm":
            return None
        if fullname in REAL:
            file = self.folder / (fullname.replace(".", "/") + ".py")
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def prepare_vllm(folder: Path) -> None:
    """From now on, `import vllm` gives what is in the folder, and stand-ins."""
    sys.meta_path.insert(0, StandIns(folder))
    one = importlib.import_module("vllm.distributed")
    one.get_tensor_model_parallel_rank = lambda: 0  # type: ignore[attr-defined]
    one.get_tensor_model_parallel_world_size = lambda: 1  # type: ignore[attr-defined]
    importlib.import_module("vllm.envs").VLLM_BATCH_INVARIANT = True  # type: ignore[attr-defined]
    platforms = importlib.import_module("vllm.platforms")
    platforms.current_platform.get_device_capability = staticmethod(lambda: None)  # type: ignore[attr-defined]
    platforms.current_platform.use_sync_weight_loader = staticmethod(lambda: False)  # type: ignore[attr-defined]
    logger = importlib.import_module("vllm.logger")
    logger.init_logger = __import__("logging").getLogger  # type: ignore[attr-defined]
    marlin = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    marlin.marlin_repeat_scales_on_all_ranks = lambda *_: False  # type: ignore[attr-defined]
    invariant = importlib.import_module("vllm.model_executor.determinism.batch_invariant")
    invariant.matmul_batch_invariant = torch.matmul  # type: ignore[attr-defined]
    # re-exported by a package whose other parts need a GPU
    schemes = importlib.import_module(SCHEME.rpartition(".")[0])
    schemes.CompressedTensorsScheme = importlib.import_module(BASE_SCHEME).CompressedTensorsScheme  # type: ignore[attr-defined]
    schemes.CompressedTensorsWNA16 = importlib.import_module(SCHEME).CompressedTensorsWNA16  # type: ignore[attr-defined]


def read(folder: Path) -> dict[str, Any]:
    """vLLM's reading of a checkpoint of a Llama, layer by layer."""
    tensors = load_file(folder / "model.safetensors")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = importlib.import_module(CONFIG).CompressedTensorsConfig.from_config(stored)
    config.packed_modules_mapping = FUSED
    ours = packed_layers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    largest, layers = 0.0, 0
    for name in sorted({_fused(name) for name in ours}):
        parts = [part for part in ours if _fused(part) == name]
        linear = type("LinearBase", (torch.nn.Module,), {})()
        scheme_of = config.get_scheme_dict(_named(linear, "Linear"), name)
        scheme = config._get_scheme_from_parts(
            scheme_of["weights"], scheme_of["input_activations"], None, scheme_of["format"], name
        )
        outputs = [ours[part].out_features for part in parts]
        inputs = ours[parts[0]].in_features
        scheme.create_weights(linear, sum(outputs), inputs, outputs, inputs, torch.float32, lambda *_: None)
        for parameter, wanted in dict(linear.named_parameters()).items():
            given = _stacked(tensors, parts, parameter)
            if parameter != "weight_shape" and given.shape != wanted.shape:
                raise ValueError(
                    f"{name}.{parameter}: vLLM makes {tuple(wanted.shape)}, we store {tuple(given.shape)}"
                )
            wanted.data = given.to(wanted.dtype)
        x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(layers))
        found = scheme.apply_weights(linear, x, None)
        with torch.no_grad():
            expected = torch.cat([ours[part](x) for part in parts], dim=-1)
        largest = max(largest, float((found - expected).abs().max() / expected.abs().max()))
        layers += 1
    return {"layers": layers, "scheme": type(scheme).__name__, "type": str(scheme.quant_type), "difference": largest}


def _fused(name: str) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.{next((fused for fused, parts in FUSED.items() if last in parts), last)}"


def _named(module: torch.nn.Module, kind: str) -> torch.nn.Module:
    """vLLM compares a target with the name of the layer's class."""
    type(module).__name__ = kind
    return module


def _stacked(tensors: dict[str, torch.Tensor], parts: list[str], parameter: str) -> torch.Tensor:
    found = [tensors[f"{part}.{parameter}"] for part in parts]
    return found[0] if parameter == "weight_shape" else torch.cat(found)


def measure(run: Run) -> None:
    """Write, and let vLLM read."""
    missing = [name for name in FORMATS if run.find({"format": name}) is None]
    if not missing:
        return
    unpacked = os.environ.get(VLLM_VARIABLE)
    if not unpacked or not Path(unpacked, "vllm").is_dir():
        raise NotHere(f"{VLLM_VARIABLE} names no folder that holds vllm/, unpacked out of its wheel.")
    prepare_vllm(Path(unpacked))
    with kernel.using(**{KERNEL_VARIABLE: "exact"}):
        for name in missing:
            with tempfile.TemporaryDirectory() as folder:
                run.add({"format": name}, _measure(Path(folder), FORMATS[name]))


def _measure(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), PeqaConfig(**options)).unload()
    model.save_pretrained(folder)
    try:
        return read(folder)
    except (ValueError, KeyError, NotImplementedError) as error:
        return {"refused": str(error)[:300]}


def tables(run: Run) -> dict[str, str]:
    """By format."""
    lines = []
    for row in run.rows:
        name, found = row["key"]["format"], row["result"]
        if "refused" in found:
            lines.append([name, "refused", found["refused"], None])
        else:
            lines.append([name, found["layers"], found["type"], f"{found['difference']:.0e}"])
    headers = ["What we write", "Layers read", "vLLM's type", "Output beside ours, relative"]
    return {"What vLLM's code reads": markdown_table(headers, lines)}


def claims(run: Run) -> list[Claim]:
    """What vLLM's reference product gives is ours."""
    found = [row["result"].get("difference", float("inf")) for row in run.rows]
    return [Claim("output of vLLM's product beside ours, relative, at worst", max(found, default=None), TOLERANCE)]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
