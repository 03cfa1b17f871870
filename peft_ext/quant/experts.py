# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The experts that transformers keeps as 3-D parameters, as linear layers with names, and back.

transformers 5 holds the weights of all experts of a block in one parameter, `experts.gate_up_proj` `[experts, 2 * inter,
hidden]` and `experts.down_proj` `[experts, hidden, inter]` (some families transposed, interleaved, with biases). No tuner
and no checkpoint format knows such parameters by layer. [`unfuse_experts`] puts a module with ordinary layers in their place,
`experts.3.gate_proj`, `experts.3.up_proj`, `experts.3.down_proj`, which is how checkpoints of packed experts name them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.moe import _default_apply_gate


# while an expert's layers run, in the thread that runs them: whose, the tokens that their rows are, and how many tokens there
# are in all
_rows = threading.local()
_GATE_UP, _UP, _DOWN = "gate_up_proj", "up_proj", "down_proj"


class Projections(NamedTuple):
    """What the layers of an expert are called; `gate` is None where it has none."""

    gate: Optional[str]
    up: str
    down: str


class Expert(nn.Module):
    """The layers of one expert; [`UnfusedExperts`] computes with them."""


class Pairing(NamedTuple):
    """Tells [`UnfusedExperts`] that its rows are two copies of a batch, one after the other, whose experts each take the same
    tokens of both: those that either copy's router sends.

    Args:
        masks: `[samples, tokens]` each; where one fits a copy, tokens that don't count are sent nowhere.
    """

    masks: tuple[torch.Tensor, ...] = ()


class UnfusedExperts(nn.Module):
    """Takes the place of a module with fused experts; its layers are ordinary ones, which may be packed or tuned.

    Args:
        experts: The fused module. It gives its weights away (views of them at first) and keeps its activation.
        names: What the layers are called.
    """

    def __init__(self, experts: nn.Module, names: Projections) -> None:
        super().__init__()
        # not a child: it has no weights any more, but knows the gate and how to be made whole again
        self._fused = (experts,)
        self.names = names
        self.num_experts: int = experts.num_experts  # type: ignore[assignment]
        self.pairing: Optional[Pairing] = None
        for name, child in experts.named_children():  # the activation, a norm behind each expert
            self.add_module(name, child)
        layout = layout_of(experts)
        if layout is None:
            raise ValueError(f"{type(experts).__name__} has no fused experts in a layout that is known here.")
        for index in range(self.num_experts):
            expert = Expert()
            for name, (weight, bias) in layout.layers(experts, index, names).items():
                expert.add_module(name, _linear(weight, bias))
            self.add_module(str(index), expert)
        # a new dict: after a forward pass of compressed-tensors' the old one copies what is put into it
        experts.__dict__["_parameters"] = {
            name: nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            for name, parameter in experts.named_parameters(recurse=False)
        }
        self.train(experts.training)

    @property
    def fused(self) -> Any:
        """The module in whose place this one stands, without its weights."""
        return self._fused[0]

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers of all experts with their names from here, such as `"3.gate_proj"`."""
        for index in range(self.num_experts):
            for name, layer in self.get_submodule(str(index)).named_children():
                yield f"{index}.{name}", layer

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """As the fused module's.

        Args:
            hidden_states: `[tokens, hidden]`; without routing `[experts * tokens, hidden]`, an input of each expert for
                every token, zero where the token isn't the expert's (Llama 4).
            routing, named: The experts of each token, int `[tokens, k]`, and their weights `[tokens, k]`, in this order.
        """
        given = (*routing, *named.values())
        if not given:
            return self._forward_scattered(hidden_states)
        total = torch.zeros_like(hidden_states)
        sent = list(self._sent(*given))
        if not sent:
            return total
        # gathered at once: a gather for each expert would cost the backward a tensor like hidden_states each
        experts, rows, factors = zip(*sent)
        tokens = torch.cat(rows)
        inputs = hidden_states[tokens].split([len(some) for some in rows])
        outputs = [self._run(*one, len(hidden_states)) for one in zip(experts, inputs, rows)]
        weighted = torch.cat(outputs) * torch.cat(factors)[:, None]
        return total.index_add(0, tokens, weighted.to(total.dtype))

    def _sent(self, index: torch.Tensor, weights: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of each expert that has any: its tokens and their weights."""
        if self.pairing is not None:
            yield from self._sent_in_pairs(index, weights)
            return
        chosen, order = torch.sort(index.flatten(), stable=True)
        rows, factors = order // index.shape[-1], weights.flatten()[order]
        counts = self._counts(chosen)
        for expert, (some, factor) in enumerate(zip(rows.split(counts), factors.split(counts))):
            if expert < self.num_experts and len(some):  # the last is no expert: what expert parallelism has elsewhere
                yield expert, some, factor

    def _counts(self, chosen: torch.Tensor) -> list[int]:
        """Rows of each expert, and of none; `chosen`: the experts of all rows, sorted."""
        if chosen.is_meta:  # nobody knows; evenly
            each, more = divmod(len(chosen), self.num_experts)
            return [each + (expert < more) for expert in range(self.num_experts)] + [0]
        return torch.bincount(chosen.clamp(max=self.num_experts), minlength=self.num_experts + 1).tolist()

    def _sent_in_pairs(
        self, index: torch.Tensor, weights: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for expert in range(self.num_experts):
            chosen = index == expert
            rows = self._pairs(chosen.any(-1))
            if len(rows):
                yield expert, rows, (weights * chosen).sum(-1)[rows]

    def _pairs(self, chosen: torch.Tensor) -> torch.Tensor:
        """Rows of both copies, from which rows `[both copies]` an expert was sent."""
        either = chosen.view(2, -1).any(0)
        for mask in () if self.pairing is None else self.pairing.masks:
            if mask.numel() == len(either):
                either = either & mask.flatten().bool()
        some = either.nonzero()[:, 0]
        return torch.cat([some, some + len(either)])

    def _forward_scattered(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        outputs = []
        for expert, rows_of_all in enumerate(inputs):
            if rows_of_all.is_meta:
                outputs.append(self._run(expert, rows_of_all, None, len(rows_of_all)))
                continue
            chosen = (rows_of_all != 0).any(-1)
            rows = chosen.nonzero()[:, 0] if self.pairing is None else self._pairs(chosen)
            output = torch.zeros_like(rows_of_all)
            if len(rows):
                computed = self._run(expert, rows_of_all[rows], rows, len(rows_of_all))
                output = output.index_copy(0, rows, computed.to(output.dtype))
            outputs.append(output)
        return torch.stack(outputs).view(-1, hidden_states.shape[-1])

    def _run(self, expert: int, rows: torch.Tensor, tokens: Optional[torch.Tensor], token_count: int) -> torch.Tensor:
        """One expert on its rows `[n, hidden]`, which are these tokens."""
        module: Any = self._modules[str(expert)]
        layers, fused = module._modules, self.fused
        _rows.now = (self, tokens, token_count)
        try:
            up = layers[self.names.up](rows)
            if self.names.gate is None:
                inner = fused.act_fn(up)
            else:
                inner = self._gated(layers[self.names.gate](rows), up)
            output = layers[self.names.down](inner)
        finally:
            _rows.now = None
        norm = getattr(self, "post_expert_norm", None)
        return output if norm is None else norm(output)

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        fused = self.fused
        if getattr(type(fused), "_apply_gate", _default_apply_gate) is _default_apply_gate:
            return fused.act_fn(gate) * up
        # each family's own gate takes both as the fused product gives them
        together = (gate, up)
        both = torch.cat(together, -1) if fused.is_concatenated else torch.stack(together, -1).flatten(-2)
        return fused._apply_gate(both)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {type(self.fused).__name__}"


class Layout(NamedTuple):
    """How a fused module stores its experts: with a gate or without, `[out, in]` or transposed, gate and up one after the
    other or by turns."""

    has_gate: bool
    is_transposed: bool
    is_concatenated: bool

    def layers(
        self, experts: nn.Module, index: int, names: Projections
    ) -> dict[str, tuple[nn.Parameter, Optional[nn.Parameter]]]:
        """Weight `[out, in]` and bias `[out]` of an expert's layers by name; views, where the layout has them in one piece."""
        if not self.has_gate:
            return {names.up: self._view(experts, _UP, index), names.down: self._view(experts, _DOWN, index)}
        weight, bias = self._view(experts, _GATE_UP, index)
        gate, up = self.split(weight)
        gate_bias, up_bias = (None, None) if bias is None else self.split(bias)
        assert names.gate is not None
        return {
            names.gate: (_like(weight, gate), _like(bias, gate_bias)),
            names.up: (_like(weight, up), _like(bias, up_bias)),
            names.down: self._view(experts, _DOWN, index),
        }

    def split(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate's and up's rows of a weight, or numbers of a bias."""
        both = both.detach()
        if self.is_concatenated:
            gate, up = both.chunk(2)
            return gate, up
        return both[::2], both[1::2]

    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The inverse of [`split`]."""
        return torch.cat([gate, up]) if self.is_concatenated else torch.stack([gate, up], 1).flatten(0, 1)

    def _view(self, experts: nn.Module, name: str, index: int) -> Any:
        whole, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
        weight = whole.detach()[index]
        weight = weight.t() if self.is_transposed else weight
        return _like(whole, weight), _like(bias, None if bias is None else bias.detach()[index])


def _like(parameter: Optional[torch.Tensor], data: Optional[torch.Tensor]) -> Any:
    if parameter is None or data is None:
        return None
    # a view, unless it is transposed or interleaved: such ones can't be saved, and are slow
    return nn.Parameter(data.contiguous(), requires_grad=parameter.requires_grad)


def _linear(weight: nn.Parameter, bias: Optional[nn.Parameter]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer


def layout_of(module: nn.Module) -> Optional[Layout]:
    """How a module stores fused experts; None if it has none that can be unfused."""
    down, count = getattr(module, _DOWN, None), getattr(module, "num_experts", None)
    if not isinstance(down, nn.Parameter) or down.dim() != 3 or down.shape[0] != count:
        return None
    if type(module).__name__ == "Llama4TextExperts":  # the one family without transformers' description of it
        return Layout(has_gate=True, is_transposed=True, is_concatenated=True)
    flags = [getattr(module, name, None) for name in ("has_gate", "is_transposed", "is_concatenated", "has_bias")]
    if not all(isinstance(flag, bool) for flag in flags) or module._is_expert_parallel:
        return None
    first = getattr(module, _GATE_UP if flags[0] else _UP, None)
    if not isinstance(first, nn.Parameter) or first.dim() != 3:
        return None
    return Layout(*flags[:3])  # type: ignore[arg-type]


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model whose experts are fused and can be unfused, by name."""
    return {name: module for name, module in model.named_modules() if layout_of(module) is not None}


def unfused_experts(model: nn.Module) -> dict[str, UnfusedExperts]:
    """The modules whose experts have been unfused, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def merges_experts(converter: object) -> bool:
    """Whether an entry of transformers' conversions makes 3-D parameters of single experts' weights at load."""
    if not isinstance(converter, WeightConverter):
        return False
    return any(".*." in source and "expert" in source for source in converter._original_source_patterns)


def projection_names(model: nn.Module) -> Projections:
    """What a family's checkpoints call the layers of an expert, where they keep them apart; otherwise the usual names."""
    names = {_GATE_UP: ["gate_proj", "up_proj"], _UP: ["up_proj"], _DOWN: ["down_proj"]}
    for converter in get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else ():
        if merges_experts(converter) and len(converter._original_target_patterns) == 1:
            target = converter._original_target_patterns[0].rpartition(".")[2]
            stored = [source.split(".")[-2] for source in converter._original_source_patterns]
            if target in names and len(stored) == len(names[target]):
                names[target] = stored
    gate, up = names[_GATE_UP]
    return Projections(gate, up, names[_DOWN][0])


def names_for(module: nn.Module, names: Projections) -> Projections:
    """A model's names for one of its modules with fused experts, which may have no gate."""
    layout = layout_of(module)
    return names if layout is None or layout.has_gate else names._replace(gate=None)


def future_layers(model: nn.Module) -> dict[str, str]:
    """The layers that unfusing would give a model, mapped to the module that has them fused now."""
    fused = fused_experts(model)
    if not fused:
        return {}
    all_names = projection_names(model)
    return {
        f"{prefix}.{index}.{name}": prefix
        for prefix, module in fused.items()
        for index in range(cast(int, module.num_experts))
        for name in names_for(module, all_names)
        if name is not None
    }


def unfuse_experts(model: nn.Module, wanted: Callable[[str], Any]) -> list[str]:
    """Unfuse, in place, the experts of which a layer is wanted, one block after the other.

    Args:
        wanted: Says of a layer's name, such as `"model.layers.0.mlp.experts.3.gate_proj"`, whether it is.

    Returns:
        The names of the modules whose experts are unfused now.
    """
    prefixes = list(dict.fromkeys(prefix for name, prefix in future_layers(model).items() if wanted(name)))
    names = projection_names(model) if prefixes else None
    for prefix in prefixes:
        assert names is not None
        module = model.get_submodule(prefix)
        model.set_submodule(prefix, UnfusedExperts(module, names_for(module, names)))
    return prefixes


def fuse_experts(model: nn.Module) -> None:
    """Fuse, in place, unfused experts whose layers are all float ones, as they were."""
    for prefix, module in unfused_experts(model).items():
        layers = dict(module.layers())
        if all(type(layer) is nn.Linear for layer in layers.values()):
            model.set_submodule(prefix, _fused_again(module))


@torch.no_grad()
def _fused_again(module: UnfusedExperts) -> nn.Module:
    experts, names = module.fused, module.names
    layout = layout_of(experts)
    assert layout is not None  # it was one when it was unfused
    halves = {_DOWN: (names.down,), **({_GATE_UP: (names.gate, names.up)} if names.gate else {_UP: (names.up,)})}
    for name, parts in halves.items():
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            if getattr(experts, name + suffix, None) is None:
                continue
            whole = []
            for index in range(module.num_experts):
                tensors = [getattr(module.get_submodule(f"{index}.{part}"), kind).data for part in parts]
                joined = tensors[0] if len(tensors) == 1 else layout.join(*tensors)
                whole.append(joined.t() if kind == "weight" and layout.is_transposed else joined)
            trained = getattr(experts, name + suffix).requires_grad
            setattr(experts, name + suffix, nn.Parameter(torch.stack(whole), requires_grad=trained))
    experts.train(module.training)
    return experts


class Place(NamedTuple):
    """Where a layer of a block with experts stands: inside of an expert, or beside them, where the batch is flattened."""

    experts: UnfusedExperts
    inside: bool

    def samples(self, x: torch.Tensor, count: int) -> Optional[torch.Tensor]:
        """Which of `count` samples each row of the layer's input is; None if it has a row for each sample as it is.

        Raises:
            ValueError: If the rows don't divide into so many samples.
        """
        if self.inside:
            experts, tokens, total = getattr(_rows, "now", None) or (None, None, 0)
            tokens = tokens if experts is self.experts else None
        else:
            if x.dim() != 2:
                return None
            tokens, total = torch.arange(len(x), device=x.device), len(x)
        if total % count or tokens is None:
            raise ValueError(
                f"{count} adapters' names for a batch of {total} tokens in a block with experts; pass one name for each sample."
            )
        return tokens // (total // count)


def places(model: nn.Module) -> dict[nn.Module, Place]:
    """The modules in the blocks of a model whose experts are unfused, and where they stand."""
    found = {}
    for prefix, experts in unfused_experts(model).items():
        block = model.get_submodule(prefix.rpartition(".")[0])
        inside = set(experts.modules())
        found.update({module: Place(experts, module in inside) for module in block.modules()})
    return found
