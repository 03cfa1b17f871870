# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Where the text so far comes from, encoded: from the forward pass that `generate` has just run, or from one of our
own."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.candidate_generator import CandidateGenerator

from generation_ext.shared_prefix.candidates import Prefix, can_branch, counts_tokens, is_running, run_reading
from generation_ext.shared_prefix.inner_states import decoder_layers, output_state
from generation_ext.shared_prefix.running_states import NOTHING, FedStates, RunningStates, Wanted, numbered, same_rows
from peft_ext.language_model import CACHE_NAMES, CAUSAL, FULL, LanguageModel


# Forward passes of one step that are looked at: generate's own, and those of other processors (classifier-free guidance).
_KEPT = 4
_CROSS = ("encoder_hidden_states", "encoder_attention_mask")


@dataclass
class RecordedForward:
    """What a forward pass of the backbone took and gave; the cache isn't kept alive. `states` are all last hidden states of
    a single row's several tokens."""

    input_ids: Optional[torch.Tensor]
    mask: Any
    positions: Optional[torch.Tensor]
    cache: Callable[[], Optional[Cache]]
    length: int
    hidden: torch.Tensor
    tokens: int
    cross: dict[str, Any]
    fed: Optional[FedStates] = None
    states: Optional[torch.Tensor] = None


class LastStates(NamedTuple):
    """Of the text so far, the last hidden states `[batch, hidden]`, and what else is read; or of candidates, `[batch, k, ...]`.
    There may be no last ones where they aren't read."""

    hidden: Optional[torch.Tensor]
    running: RunningStates


class ForwardRecorder:
    """Records each forward pass of a backbone, in the thread that runs it, until `close`.

    The hook holds the recorder weakly, and goes with it.

    Args:
        model: The language model.
        wanted: What is read of its states beside the last ones.
    """

    def __init__(self, model: LanguageModel, wanted: Wanted = NOTHING) -> None:
        self.model = model
        self.wanted = wanted
        self._local = threading.local()
        this = weakref.ref(self)

        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            recorder = this()
            # torch registers and removes in two steps; between them another thread's pass comes without its kwargs
            if recorder is None or len(rest) != 2 or is_running() or torch.compiler.is_compiling():
                return
            if is_drafting():  # by the model itself, with fewer layers
                return
            recorder._record(args, *rest)

        def outer_hook(module: nn.Module, args: tuple[Any, ...], kwargs: Optional[dict[str, Any]] = None) -> None:
            recorder = this()
            if recorder is not None and kwargs is not None and not is_running() and not torch.compiler.is_compiling():
                recorder._local.outer = kwargs.get("input_ids", args[0] if args else None)

        def logits_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recorder = this()
            if recorder is None or is_running() or torch.compiler.is_compiling() or recorder.recorded is None:
                return
            logits = getattr(output, "logits", None)
            # of several tokens of a single row: they may be drafted ones
            if logits is not None and recorder.recorded.states is not None and logits.shape[1] > 1:
                recorder._local.logits = logits

        handles = [model.backbone.register_forward_hook(hook, with_kwargs=True)]
        layers = decoder_layers(model)
        self._inner = [index for index in wanted.layers if layers is not None and index < len(layers)]
        for index in self._inner:
            handles.append(layers[index - 1].register_forward_hook(_layer_hook(this, index)))  # type: ignore[index]
        if model.base is not model.backbone:
            handles.append(model.base.register_forward_hook(logits_hook))
        if model.kind == CAUSAL and model.base is not model.backbone:
            # a model that also sees embeds its tokens itself, and its backbone isn't given them
            handles.append(model.base.register_forward_pre_hook(outer_hook, with_kwargs=True))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def close(self) -> None:
        """Take the hooks off. Harmless when repeated."""
        self._finalizer()
        self._local.cross, self._local.inner = {}, {}
        self._fed.clear()

    @property
    def recorded(self) -> Optional[RecordedForward]:
        """The last forward pass, unless it was dropped."""
        return self._recent[0] if self._recent else None

    @property
    def cross(self) -> dict[str, Any]:
        """An encoder's states and mask, as the last forward pass took them; also after it was dropped, since drafted tokens
        (assisted decoding) are scored one by one after a single pass."""
        return getattr(self._local, "cross", {})

    @property
    def _recent(self) -> list[RecordedForward]:
        """The last forward passes since they were dropped, the last first."""
        return getattr(self._local, "recent", [])

    @property
    def logits(self) -> Optional[torch.Tensor]:
        """Those of the last forward pass, `[1, tokens, vocabulary]`, if it had several for a single row."""
        return getattr(self._local, "logits", None)

    def drop(self) -> None:
        """Forget the last forward passes."""
        self._local.recent, self._local.logits = [], None

    def running(self, recorded: RecordedForward, texts: list[torch.Tensor]) -> Optional[RunningStates]:
        """What is read of beginnings of the text that a forward pass was the encoding of, one row for each; None if it doesn't
        tell.

        Args:
            recorded: A pass of one row.
            texts: Tokens `[1, n]` each, the whole text last.
        """
        if not self.wanted.layers:
            return RunningStates()
        each: list[RunningStates] = []
        for text in texts:
            length = recorded.length - texts[-1].shape[1] + text.shape[1]
            found = None if recorded.fed is None else recorded.fed.at_end_of(text, length)
            if found is None:
                return None
            each.append(found)
        return RunningStates.stacked(each)

    def drafted(self, input_ids: torch.Tensor) -> Optional[int]:
        """How many tokens more than those of `input_ids` the last forward pass read; None if that isn't known."""
        recorded = self.recorded
        cache = None if recorded is None else recorded.cache()
        if recorded is None or cache is None:
            return None
        begun, more = getattr(self._local, "more", (None, 0))
        if begun is None or begun() is not cache:
            if recorded.tokens != recorded.length:
                return None
            more = 0
            self._local.more = (weakref.ref(cache), more)
        return recorded.length - more - input_ids.shape[1]

    def whole(self, recorded: RecordedForward, cache: Cache) -> Optional[Prefix]:
        """All tokens of a forward pass's cache as a text, without what else is read of it; None if candidates can't be
        encoded on it."""
        if not can_branch(cache):
            return None
        mask = self._mask(recorded, cache)
        if mask is not None and mask.shape != (len(recorded.hidden), recorded.length):
            return None
        positions = None if recorded.positions is None else recorded.positions[..., -1:] + 1
        return Prefix(cache, recorded.length, recorded.hidden, mask, positions, recorded.cross)

    def prefix(self, input_ids: torch.Tensor) -> Optional[Prefix]:
        """One of the last forward passes as the encoding of `input_ids`, or None if none was that.

        Args:
            input_ids: The text so far, `[batch, tokens]`.
        """
        recorded, cache = self._of(input_ids)
        if recorded is None or cache is None:
            return None
        whole = self.whole(recorded, cache)
        running = None if whole is None else self._running(recorded, input_ids)
        return None if whole is None or running is None else replace(whole, running=running)

    def last(self, input_ids: torch.Tensor) -> Optional[LastStates]:
        """What is read of `input_ids`, if one of the last forward passes gave it, with a cache or without."""
        recorded, _ = self._of(input_ids)
        running = None if recorded is None else self._running(recorded, input_ids)
        return None if recorded is None or running is None else LastStates(recorded.hidden, running)

    def went_on(self, prefix: Prefix, input_ids: torch.Tensor) -> None:
        """Be told that a cache has gone on without a forward pass that was recorded.

        Args:
            prefix: The text in the cache.
            input_ids: Its tokens `[batch, tokens]`.
        """
        before = self._fed.get(prefix.cache)
        if before is not None:
            self._fed[prefix.cache] = before.moved(prefix.running, prefix.length, input_ids)

    def _running(self, recorded: RecordedForward, input_ids: torch.Tensor) -> Optional[RunningStates]:
        if not self.wanted.layers:
            return RunningStates()
        return None if recorded.fed is None else recorded.fed.at_end_of(input_ids, recorded.length)

    def _of(self, input_ids: torch.Tensor) -> tuple[Optional[RecordedForward], Optional[Cache]]:
        """The forward pass that encoded this text, and its cache; the one on the cache that generation began with before
        those of other processors, which go on with the same tokens behind another prompt."""
        begun = getattr(self._local, "more", (lambda: None, 0))[0]()
        passes = [(recorded, recorded.cache()) for recorded in self._recent]
        passes.sort(key=lambda each: begun is None or each[1] is not begun)  # stable: the last first
        for recorded, cache in passes:
            if len(recorded.hidden) != len(input_ids):
                continue
            if cache is None:
                same = recorded.input_ids is not None and _equal(recorded.input_ids, input_ids)
            else:
                same = self._is_of(recorded, cache, input_ids)
            if same:
                return recorded, cache
        return None, None

    def _is_of(self, recorded: RecordedForward, cache: Cache, input_ids: torch.Tensor) -> bool:
        """Whether rows and last tokens are the same, and the cache has as many more tokens than `input_ids` (an
        embedded prompt, virtual tokens, an earlier text) as it had when generation began."""
        more = recorded.length - input_ids.shape[1]
        if len(recorded.hidden) != len(input_ids) or more < 0:
            return False
        fed = input_ids.shape[1] if recorded.input_ids is None else recorded.tokens
        if recorded.input_ids is not None:
            if fed > input_ids.shape[1] or not _equal(recorded.input_ids, input_ids[:, input_ids.shape[1] - fed :]):
                return False
        begun, more_then = getattr(self._local, "more", (None, 0))
        goes_on = begun is not None and begun() is cache
        if goes_on and more != more_then and cache in self._first and self._began_with(cache, input_ids):
            return False  # drafted tokens were fed, of which this text has some, and they are all alike
        if fed == input_ids.shape[1]:
            self._local.more = (weakref.ref(cache), more)
            return True
        if goes_on:
            return more == more_then
        return more == 0 and self._began_with(cache, input_ids)

    def _began_with(self, cache: Cache, input_ids: torch.Tensor) -> bool:
        """Whether the first tokens that a cache was fed are those of the text, as far as that was seen."""
        first = self._first.get(cache)
        if first is None:
            return True
        if len(input_ids) % len(first):
            return False
        rows = first.repeat_interleave(len(input_ids) // len(first), dim=0)
        return _equal(rows, input_ids[:, : first.shape[1]])

    @property
    def _first(self) -> weakref.WeakKeyDictionary[Cache, torch.Tensor]:
        """The tokens of the pass that filled an empty cache."""
        if not hasattr(self._local, "first"):
            self._local.first = weakref.WeakKeyDictionary()
        return self._local.first

    @property
    def _fed(self) -> weakref.WeakKeyDictionary[Cache, FedStates]:
        """What the last pass on each cache added."""
        if not hasattr(self._local, "fed"):
            self._local.fed = weakref.WeakKeyDictionary()
        return self._local.fed

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(self.model.parameters, args)), **kwargs}
        hidden = output[0]
        input_ids, outer = given.get("input_ids"), getattr(self._local, "outer", None)
        self._local.outer = None
        if input_ids is None and isinstance(outer, torch.Tensor) and outer.shape == hidden.shape[:2]:
            input_ids = outer
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if cache is None:
            cache = next(
                (given_back for name in CACHE_NAMES if (given_back := getattr(output, name, None)) is not None), None
            )
        cache = cache if isinstance(cache, Cache) else None
        length = hidden.shape[1] if cache is None else _length(cache, hidden.shape[1])
        if cache is not None and length == hidden.shape[1]:
            self._first.pop(cache, None)
            if input_ids is not None:
                self._first[cache] = input_ids
        recorded = RecordedForward(
            input_ids=input_ids,
            mask=given.get("attention_mask"),
            positions=given.get("position_ids"),
            cache=(lambda: None) if cache is None else weakref.ref(cache),
            length=length,
            hidden=hidden[:, -1].clone(),
            tokens=hidden.shape[1],
            cross={name: given[name] for name in _CROSS if given.get(name) is not None},
            states=hidden.detach().clone() if hidden.shape[0] == 1 < hidden.shape[1] else None,
        )
        inner, self._local.inner = getattr(self._local, "inner", {}), {}
        if self.wanted.layers:
            last = {index: hidden.detach() for index in self.wanted.layers if index not in self._inner}
            recorded.fed = self._fed_by(recorded, cache, {**last, **inner}, given)
        self._local.logits = None
        self._local.cross = recorded.cross
        self._local.recent = [recorded, *self._recent[: _KEPT - 1]]

    def _fed_by(
        self, recorded: RecordedForward, cache: Optional[Cache], states: dict[int, torch.Tensor], given: dict[str, Any]
    ) -> Optional[FedStates]:
        """What a pass added to its texts, of which it gave `states`."""
        shape = (len(recorded.hidden), recorded.tokens)
        if len(states) < len(self.wanted.layers) or any(state.shape[:-1] != shape for state in states.values()):
            return None  # of a compiled model, layers aren't seen
        real = self._real(recorded, cache)
        if real is not None and real.shape != shape:
            return None

        def prompts() -> Optional[torch.Tensor]:
            if cache is None or len(recorded.hidden) == 1:
                return None
            embedded = given.get("inputs_embeds") if recorded.input_ids is None else None
            return numbered([embedded, recorded.cross.get(_CROSS[0]), real])

        before = None if cache is None else self._fed.get(cache)
        fed = FedStates.of(self.wanted, states, real, recorded.length, before, prompts)
        if cache is not None:
            self._fed[cache] = fed
        return fed

    def _real(self, recorded: RecordedForward, cache: Optional[Cache]) -> Optional[torch.Tensor]:
        """Which tokens of a pass are no padding, bool `[batch, tokens]`; None: all of them."""
        mask = _of_attention(recorded.mask)
        if mask is None:
            return None
        start = recorded.length - recorded.tokens
        if mask.ndim == 2:
            real = mask[:, start : recorded.length].bool()
        else:
            # a token sees itself, unless it is padding; slots of a rolling buffer hold the end of the text
            first = (
                0
                if cache is None or mask.shape[-1] >= recorded.length
                else _first_slot(cache, recorded.length, recorded.tokens)
            )
            own = mask[:, 0].diagonal(start - first, dim1=-2, dim2=-1)[:, : recorded.tokens]
            real = (own if own.dtype == torch.bool else own == 0).expand(len(recorded.hidden), -1)
        return None if bool(real.all()) else real

    def _mask(self, recorded: RecordedForward, cache: Cache) -> Optional[torch.Tensor]:
        """Which tokens are real, bool `[batch, length]`, from whatever mask the forward pass took."""
        mask = _of_attention(recorded.mask)
        if mask is None:
            return None
        if mask.ndim == 2:
            return mask[:, : recorded.length].bool()
        last = mask[:, 0, -1]
        visible = last if last.dtype == torch.bool else last == 0
        real = torch.zeros(len(visible), recorded.length, dtype=torch.bool, device=visible.device)
        # slots of a rolling buffer hold the end of the text; of any other cache, its beginning
        start = _first_slot(cache, recorded.length, recorded.tokens) if visible.shape[1] < recorded.length else 0
        end = min(start + visible.shape[1], recorded.length)
        real[:, start:end] = visible[:, : end - start]
        return real.expand(len(recorded.hidden), -1)


class PrefixEncoder:
    """Encodes texts by itself, with a cache of its own; a text that goes on where the last one ended costs its new
    tokens only, whichever order the rows are in.

    Args:
        model: The language model.
        prompt_mask: 1 where a token of the prompt is real, `[prompts, tokens]`; later tokens are.
        pad_token_id: Without a `prompt_mask`, leading tokens of this kind aren't real.
        wanted: What is read of the texts' states beside the last ones.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt_mask: Optional[torch.Tensor] = None,
        pad_token_id: Optional[int] = None,
        wanted: Wanted = NOTHING,
    ) -> None:
        self.model = model
        self.wanted = wanted
        self.prompt_mask = prompt_mask
        self.pad_token_id = pad_token_id
        self._begin()

    def _begin(self) -> None:
        """Each thread has a last text of its own."""
        self._local = threading.local()

    @property
    def _last(self) -> Optional[Prefix]:
        return getattr(self._local, "last", None)

    @property
    def _ids(self) -> Optional[torch.Tensor]:
        return getattr(self._local, "ids", None)

    @property
    def _prompts(self) -> Optional[torch.Tensor]:
        return getattr(self._local, "prompts", None)

    def reset(self) -> None:
        """Forget the last text, and free its cache."""
        self._begin()

    def __call__(self, input_ids: torch.Tensor, cross: Optional[dict[str, Any]] = None) -> Prefix:
        """Encode texts `[batch, tokens]` (for an encoder-decoder: the decoder's), with an encoder's states in `cross`.

        Raises:
            ValueError: If there is no token.
        """
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids has no token; a critic reads the state after at least one (such as BOS).")
        cross = cross or {}
        rows = self._rows(input_ids, cross)
        if rows is None or self._last is None:
            last = self._encoded(input_ids, cross)
        else:
            last = self._continued(self._last, rows, input_ids)
        self._local.last, self._local.ids = last, input_ids
        return last

    def _rows(self, input_ids: torch.Tensor, cross: dict[str, Any]) -> Optional[torch.Tensor]:
        """Which row of the last texts each text goes on; None if some goes on none."""
        last, ids = self._last, self._ids
        if last is None or ids is None or ids.shape[1] != input_ids.shape[1] - 1:
            return None
        if any(last.cross.get(name) is not value for name, value in cross.items()):
            return None
        # beams: the same text may stand behind several prompts
        return same_rows(ids, input_ids[:, :-1], lambda: numbered([self._prompt_mask(ids), self._prompts]))

    def _encoded(self, input_ids: torch.Tensor, cross: dict[str, Any]) -> Prefix:
        cache: Cache = DynamicCache(config=self.model.config)
        if cross:
            cache = EncoderDecoderCache(cache, DynamicCache())  # an encoder's states have no window
            states = cross[_CROSS[0]]
            self._local.prompts = numbered([states])
        mask, positions = self._prompt_mask(input_ids), None
        if self.model.takes_positions:
            real = torch.ones_like(input_ids) if mask is None else mask.long()
            # as generate counts them: tokens that aren't real have any position
            positions = (real.cumsum(dim=-1) - 1).clamp(min=0)
        return self._run(input_ids, Prefix(cache, input_ids.shape[1], torch.empty(0), mask, positions, cross))

    def _continued(self, last: Prefix, rows: torch.Tensor, input_ids: torch.Tensor) -> Prefix:
        mask, positions = last.mask, last.positions
        if len(rows) != len(last.hidden) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            last.cache.reorder_cache(rows)
            mask = None if mask is None else mask[rows]
            positions = None if positions is None else positions[rows]
            last = replace(last, running=last.running.rows(rows))
        mask = None if mask is None else nn.functional.pad(mask, (0, 1), value=True)
        whole = replace(last, length=input_ids.shape[1], mask=mask, positions=positions)
        return self._run(input_ids[:, -1:], whole)

    def _run(self, new: torch.Tensor, whole: Prefix) -> Prefix:
        """Encode new tokens, which have the positions of `whole`, and all of the text its mask."""
        kwargs = dict(whole.cross)
        if whole.positions is not None:
            kwargs["position_ids"] = whole.positions
        if whole.mask is not None and (counts_tokens(whole.cache) or whole.mask.shape == new.shape):
            kwargs["attention_mask"] = whole.mask.long()
        hidden, states = run_reading(self.model, new, whole.cache, self.wanted.layers, **kwargs)
        assert hidden is not None
        real = None if whole.mask is None else whole.mask[:, -new.shape[1] :]
        running = whole.running.after(states, self.wanted, real).clone()
        positions = None if whole.positions is None else whole.positions[:, -1:] + 1
        return replace(whole, hidden=hidden[:, -1].clone(), positions=positions, running=running)

    def _prompt_mask(self, input_ids: torch.Tensor) -> Optional[torch.Tensor]:
        if self.prompt_mask is not None:
            mask = self.prompt_mask.to(input_ids.device).bool()
            if len(input_ids) % len(mask) or mask.shape[1] > input_ids.shape[1]:
                raise ValueError(
                    f"attention_mask has the shape {tuple(mask.shape)}, which doesn't fit texts of shape "
                    f"{tuple(input_ids.shape)}; pass the prompts' mask, [prompts, tokens]."
                )
            mask = mask.repeat_interleave(len(input_ids) // len(mask), dim=0)
            mask = nn.functional.pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=True)
        elif self.pad_token_id is not None:
            mask = (input_ids != self.pad_token_id).cumsum(dim=1) > 0
            mask[:, -1] = True
        else:
            return None
        return None if bool(mask.all()) else mask


def _of_attention(mask: Any) -> Optional[torch.Tensor]:
    """A pass's mask, or of several that of full attention."""
    if isinstance(mask, dict):
        mask = mask.get(FULL, next(iter(mask.values()), None))
    return mask if isinstance(mask, torch.Tensor) else None


def _layer_hook(recorder: Callable[[], Optional[ForwardRecorder]], index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own = recorder()
        if own is None or is_running() or torch.compiler.is_compiling():
            return
        # a copy, as the next layer may add to its input in place
        own._local.inner = {**getattr(own._local, "inner", {}), index: output_state(output).detach().clone()}

    return hook


def is_drafting() -> bool:
    """Whether this is called while tokens are drafted: there, `generate` shows its processors texts that the model hasn't
    read, for the assistant to be steered by, or to see what they rule out."""
    frame: Any = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "get_candidates" and isinstance(frame.f_locals.get("self"), CandidateGenerator):
            return True
        frame = frame.f_back
    return False


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.device), other)


def _length(cache: Cache, new_tokens: int) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # recurrent layers only; they don't count
        return new_tokens


def _first_slot(cache: Cache, length: int, new_tokens: int) -> int:
    """Position of the first key that the last forward pass's mask was about, in a sliding-window layer."""
    layer = next((layer for layer in cache.layers if getattr(layer, "is_sliding", False)), None)
    window: int = getattr(layer, "max_cache_len", None) or getattr(layer, "sliding_window", None) or length
    return max(length - new_tokens - window + 1, 0)
