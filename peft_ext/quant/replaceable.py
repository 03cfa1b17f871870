# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which layers a packed one, or an adapter around it, can take the place of, and why others can't be replaced."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_ext.quant.linear import PackedLinear


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Packages whose layers and tensors hold quantised weights, as people call them.
_QUANTIZERS = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "optimum": "optimum-quanto",
    "hqq": "HQQ",
    "quark": "Quark",
    "transformers": "transformers",
}
# Packages with wrappers of ordinary numbers: torch's own (sharded, fake, ...) and ours.
_PLAIN = ("torch", "peft_ext")
# What only prepares a model reads weights, and changes nothing about how they are used.
_PREPARATION = ("__init__", "reset_parameters", "_reset_parameters", "init_weights", "_init_weights")
# The package whose kernels take the weights of Mamba's layers instead of calling them, in training.
_FUSED_KERNELS = "mamba_ssm"


def foreign_weight(layer: Any) -> Optional[str]:
    """Whose quantised weight a layer has, in words, or None: numbers of ours and plain floats are nobody's."""
    if isinstance(layer, PackedLinear):
        return None
    weight = getattr(layer, "weight", None)
    package = _package(type(layer))
    if package in _QUANTIZERS and package != "transformers":
        return f"{_QUANTIZERS[package]}'s {type(layer).__name__}"
    if weight is None:
        return f"a {type(layer).__name__} without a float weight"
    if not isinstance(weight, torch.Tensor):
        return None
    for part in (weight, weight.data):
        if _package(type(part)) not in _PLAIN:
            return f"{_QUANTIZERS.get(_package(type(part)), _package(type(part)))}'s {type(part).__name__}"
    if weight.dtype not in _FLOATS:
        return f"a {type(layer).__name__} of {str(weight.dtype).removeprefix('torch.')}"
    return None


def check_own_weight(name: str, layer: Any) -> None:
    """Refuse a layer whose weight another library has quantised: its numbers would be rounded a second time.

    Raises:
        ValueError: Names the layer, what it is and the ways out.
    """
    found = foreign_weight(layer)
    if found is not None:
        raise ValueError(
            f"layer {name!r} is {found}: its weight is quantised already, in a format whose codes can't be taken over, and "
            "rounding it a second time would lose accuracy. Load the float model (without quantization_config=, before "
            "quantize()), or name the layer in `exclude_modules`."
        )


def acts_linearly(layer: Any) -> bool:
    """Whether a layer computes what `nn.Linear` (`Conv1D`) does: subclasses with a `forward` of their own are tried.

    Routers that return several tensors and layers that quantise their inputs don't; Falcon's do.
    """
    forward: Any = type(layer).forward
    if isinstance(layer, PackedLinear) or forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = layer.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(2, -1)
    try:
        with torch.no_grad():
            found, expected = forward(layer, x), linear(x, weight, layer.bias)
    except Exception:  # whatever it wants, it isn't a batch of vectors
        return False
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return found.device.type == "meta" or torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


def bypassed_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers whose weight a module reads instead of calling them, by name, with the class of that module.

    An adapter there gets no gradient in training and has an effect only once it is merged. Told by the module's source:
    Mamba's `dt_proj`, `nn.MultiheadAttention.out_proj`. Layers that are called in some cases only count too where the
    other case is the usual one: `nn.TransformerEncoderLayer` in evaluation, Mamba in training with mamba_ssm's kernels.
    """
    modules, found = dict(model.named_modules()), {}
    fused = importlib.util.find_spec(_FUSED_KERNELS) is not None or getattr(model, "_use_kernels", False)
    for name, layer in modules.items():
        if not isinstance(layer, (nn.Linear, Conv1D)):
            continue
        parent, _, child = name.rpartition(".")
        owner = type(modules[parent])
        always, handed_over = _weights_read(owner)  # type: ignore[arg-type]
        if child in always or (child in handed_over and (fused or _package(owner) == "torch")):
            found[name] = owner.__name__
    return found


@functools.cache
def _weights_read(owner: type) -> tuple[frozenset[str], frozenset[str]]:
    """Of a class, the children whose weight takes a layer's place always (it is multiplied with, or the child is never
    called), and those whose weight is handed to a function in some cases."""
    if issubclass(owner, PreTrainedModel):
        return frozenset(), frozenset()  # tied embeddings; nothing is computed there
    multiplied, handed_over, called = set(), set(), set()
    for node in _nodes(owner):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            multiplied |= {child for part in (node.left, node.right) if (child := _weight_of_child(part))}
        elif isinstance(node, ast.Call):
            called |= {child for child in (_child(node.func),) if child}
            if not (isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "getattr", "print")):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                handed_over |= {child for value in values if (child := _weight_of_child(value))}
    return frozenset(multiplied | (handed_over - called)), frozenset(handed_over)


def _nodes(owner: type) -> Iterator[ast.AST]:
    """The syntax of a class's methods that compute something."""
    for cls in owner.__mro__:
        if cls in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):  # made at run time, or compiled: nothing is known
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.name not in _PREPARATION:
                yield from ast.walk(method)


def _child(node: ast.AST) -> Optional[str]:
    """`name` of `self.name`."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own else None  # type: ignore[attr-defined]


def _weight_of_child(node: ast.AST) -> Optional[str]:
    """`name` of `self.name.weight`."""
    return _child(node.value) if isinstance(node, ast.Attribute) and node.attr == "weight" else None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
