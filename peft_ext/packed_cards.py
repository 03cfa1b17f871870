# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The cards of adapters and of packed models, and where PEFT and transformers get to write them.

PEFT writes a blank card before it saves an adapter; ours takes its place once the adapter's config is written.
transformers writes none when it saves, and a blank one over whatever is there when it pushes: two of its methods are
extended, which treat everything but ours as ever. See [`install`].
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import wraps
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import PushToHubMixin

from peft_ext import saved_adapters
from peft_ext.language_model import unwrapped
from peft_ext.model_card import (
    SOURCE,
    BaseModel,
    Card,
    base_model,
    facts_of,
    measured_of,
    write_card,
)
from peft_ext.models import DEFAULT_MODEL
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import NumberFormat, Uniform
from peft_ext.registration import TUNERS, extend_method
from peft_ext.sealing import seal_saved
from peft_ext.sharding import is_spread
from peft_ext.whole_saves import model_saved_whole, on_adapter_saving


PAPERS = {
    "PEQA": "https://huggingface.co/papers/2305.14152",
    "ALPHATUNING": "https://huggingface.co/papers/2210.03858",
    "BOTTLENECK": "https://huggingface.co/papers/1902.00751",
}
NAMES = {"PEQA": "PEQA", "ALPHATUNING": "AlphaTuning", "BOTTLENECK": "bottleneck adapters"}
_TRAINED = {
    "PEQA": "the scales of its integer weights",
    "ALPHATUNING": "the scaling factors of its binary-coded weights",
    "BOTTLENECK": "small networks behind its sub-layers",
}
# Fields of a config that are PEFT's book-keeping, or that the card says in other words.
_PLAIN = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "bits",
    "group_size",
    "sym",
    "zero",
    "init_method",
}
_KINDS = {"SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classifier", "FEATURE_EXTRACTION": "encoder"}
_PIPELINES = {"causal": "text-generation", "classifier": "text-classification", "encoder": "feature-extraction"}
_SAMPLED = 256
PROMPT = "Once upon a time"


def adapter_card(
    model: PeftModel,
    adapter_name: Optional[str] = None,
    token: Any = None,
    online: bool = False,
    subfolder: Optional[str] = None,
) -> Card:
    """The card of an adapter, of one of our methods or on a packed base.

    Args:
        model: Has the adapter.
        adapter_name: Which one; by default the active one.
        token, online: See [`base_model`].
        subfolder: Where the adapter lies below the card.
    """
    adapter_name = adapter_name or _one_adapter(model)
    config: Any = model.peft_config[adapter_name]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    ours = method in TUNERS
    inner = unwrapped(model)
    base = base_model(inner, config.base_model_name_or_path, token, online)
    kind = _kind(config, inner)
    packed = packed_layers(inner)
    facts: dict[str, Any] = {"method": f"[{NAMES[method]}]({PAPERS[method]})" if ours else f"{method} (PEFT)"}
    if packed:
        facts["base's weights"] = _formats(packed)
        digest = codes_digest(inner)
        if digest is not None:
            facts["their codes"] = f"`{digest}`" + (f", by `{config.init_method}`" if _tunes_scales(config) else "")
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad)
    if trained:
        facts["trained numbers"] = f"{trained:,}"
    changed = _changed_fields(config)
    if changed:
        facts["settings"] = ", ".join(f"`{name}={value!r}`" for name, value in changed.items())
    facts.update(facts_of(model))
    what = _TRAINED.get(method, "what its method adds")
    text = f"An adapter for {base}: the base stays as it is, trained were {what}."
    missing = _needs_saved_base(config, base, packed)
    notes = [] if missing is None else [missing]
    return Card(
        title=f"{NAMES.get(method, method)}{_of_bits(packed)} on {base.title}",
        text=text,
        base=base,
        relation="adapter",
        base_is=f"model.peft_config[{adapter_name!r}].base_model_name_or_path",
        library="peft",
        tags=("peft", *_tags(packed), *([NAMES[method].lower().replace(" ", "-")] if ours else [method.lower()])),
        pipeline_tag=_PIPELINES.get(kind),
        facts=facts,
        measured=measured_of(model),
        snippet=None if missing is not None or base.name is None else _adapter_snippet(kind, base.name, subfolder),
        notes=tuple(notes),
    )


def packed_card(model: PreTrainedModel, tokenizer_here: bool = False, token: Any = None, online: bool = False) -> Card:
    """The card of a model with packed layers.

    Args:
        model: The model.
        tokenizer_here: Its tokenizer lies beside it.
        token, online: See [`base_model`].
    """
    layers = packed_layers(model)
    base = base_model(model, None, token, online)
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    stored = str(getattr(getattr(method, "quant_method", ""), "value", getattr(method, "quant_method", "")))
    facts: dict[str, Any] = {"weights": _formats(layers)}
    rest = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if rest:
        facts["float linear layers"] = ", ".join(f"`{name}`" for name in rest[:4]) + (
            f" and {len(rest) - 4} more" if len(rest) > 4 else ""
        )
    size = sum(tensor.nbytes for layer in layers.values() for tensor in layer.parameters())
    whole = sum(layer.in_features * layer.out_features for layer in layers.values())
    facts["packed layers"] = (
        f"{size / 2**20:,.1f} MiB, {16 * whole / max(1, 8 * size):.1f} times smaller than bfloat16"
    )
    facts["format"] = stored
    digest = codes_digest(model)
    if digest is not None:
        facts["codes"] = f"`{digest}`"
    facts.update(facts_of(model))
    stock = "Without peft-ext these files can't be loaded."
    if stored == "compressed-tensors":
        into = " into float layers" if getattr(method, "dequantize", False) else ", too"
        stock = f"Without peft-ext, stock transformers loads the same files{into}."
    return Card(
        title=f"{base.title}, packed{_of_bits(layers)}",
        text=f"{base} with its linear layers packed. It loads packed, generates packed "
        "and is tuned packed: by PEQA, AlphaTuning or LoRA.",
        base=base,
        relation="quantized",
        library="transformers",
        tags=("transformers", *_tags(layers)),
        pipeline_tag=_PIPELINES.get(_kind_of_class(model)),
        facts=facts,
        measured=measured_of(model),
        snippet=_packed_snippet(model, base, tokenizer_here, online),
        notes=(stock,),
    )


def codes_digest(model: nn.Module) -> Optional[str]:
    """A short name of all packed layers' formats and codes, the same for a base and for what was tuned on it; of each layer
    some hundred bytes count. None where they are spread over processes."""
    digest = hashlib.sha256()
    for layer in packed_layers(model).values():
        digest.update(repr((layer.number_format, layer.out_features, layer.in_features)).encode())
        for tensor in (layer.planes, layer.zero_point):
            if tensor is None:
                continue
            if is_spread(tensor) or tensor.device.type == "meta":
                return None
            flat = tensor.detach().as_subclass(torch.Tensor).flatten()
            flat = flat.view(torch.uint8) if flat.is_floating_point() else flat
            digest.update(bytes(flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.uint8).tolist()))
    return digest.hexdigest()[:12]


def install() -> None:
    """Let PEFT and transformers write these cards when they save and push a model, and digests (`sealing.py`); doing so again
    is harmless.

    Models without packed layers, and adapters of other tuners, are saved as ever.
    """
    saved_adapters.listen("model cards", _on_adapter_saved)
    extend_method(PreTrainedModel, "save_pretrained", _on_model_saved)
    extend_method(PeftModel, "save_pretrained", on_adapter_saving(_is_adapter_of_ours))
    extend_method(PushToHubMixin, "_upload_modified_files", _on_upload)


def card_of(thing: Any, folder: Path, token: Any = None, online: bool = False) -> Optional[Card]:
    """The card of what is being saved: its own `model_card()`, an adapter's, a packed model's; None for all else.

    Args:
        thing: What is saved or pushed.
        folder: Where to.
        token, online: See [`base_model`].
    """
    own = getattr(thing, "model_card", None)
    if own is not None:
        return own(token=token, online=online)
    if isinstance(thing, PeftModel):
        if not _is_adapter_of_ours(thing):
            return None
        name = _one_adapter(thing)
        return adapter_card(thing, name, token, online, subfolder=None if name == "default" else name)
    if isinstance(thing, PreTrainedModel) and not getattr(thing, "_hf_peft_config_loaded", False):
        return packed_card(thing, _has_tokenizer(folder), token, online) if packed_layers(thing) else None
    return None


@contextmanager
def _said() -> Iterator[None]:
    """What goes wrong with a card is said, and no checkpoint is lost for it."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"no model card was written: {type(error).__name__}: {error}", stacklevel=3)


def _on_adapter_saved(model: Any, adapter_name: str, folder: Path) -> None:
    if isinstance(model, PeftModel):
        with _said():
            write_card(adapter_card(model, adapter_name), folder)


def _on_model_saved(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, *args, **kwargs):
        with model_saved_whole(self, save_directory, is_main_process, kwargs) as path:
            original(self, path, is_main_process, *args, **kwargs)
            folder = Path(path)
            if is_main_process and folder.is_dir():
                seal_saved(self, folder)
            # an upload has written it already, with the repository's name
            if is_main_process and not kwargs.get("push_to_hub") and folder.is_dir():
                with _said():
                    card = card_of(self, folder)
                    if card is not None:
                        write_card(card, folder)

    return save_pretrained


def _on_upload(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def _upload_modified_files(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        seal_saved(self, Path(working_dir))
        card = card_of(self, Path(working_dir), kwargs.get("token"), online=True)
        if card is None:
            return original(self, working_dir, repo_id, *args, **kwargs)
        card.warn_of_local_base(repo_id)
        write_card(card, Path(working_dir), repo_id)
        done = original(self, working_dir, repo_id, *args, **kwargs)
        is_base = isinstance(self, PreTrainedModel) and card.relation == "quantized"
        if is_base and kwargs.get("revision") is None and not kwargs.get("create_pr"):
            # what is tuned on it from here on names what others can load
            self.name_or_path = self.config._name_or_path = repo_id
        return done

    return _upload_modified_files


def _is_adapter_of_ours(model: PeftModel) -> bool:
    methods = {getattr(config.peft_type, "value", config.peft_type) for config in model.peft_config.values()}
    return bool(methods & set(TUNERS)) or bool(packed_layers(unwrapped(model)))


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _one_adapter(model: PeftModel) -> str:
    active = model.active_adapter
    return active if isinstance(active, str) and active in model.peft_config else next(iter(model.peft_config))


def _needs_saved_base(config: Any, base: BaseModel, packed: dict[str, Any]) -> Optional[str]:
    """What a reader has to know where the adapter belongs to calibrated codes that its base's name doesn't lead to."""
    if not _tunes_scales(config) or not config.needs_data or not packed:
        return None
    if base.name is None or not (base.name == DEFAULT_MODEL or _is_packed_folder(base.name) is False):
        return None
    return (
        "The adapter belongs to the packed weights that calibration made of the base, which its name alone doesn't give back: "
        'save them, `model.unload().save_pretrained("base")` or `.push_to_hub("owner/base")`, and load both: '
        '`peft_ext.load("base", adapter="...")`.'
    )


def _is_packed_folder(name: str) -> Optional[bool]:
    """Whether a model's config says that it is packed; None: that isn't known here."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except Exception:  # it may be anything, and lie anywhere
        return None
    return getattr(config, "quantization_config", None) is not None


def _tunes_scales(config: Any) -> bool:
    return hasattr(config, "number_format")


def _changed_fields(config: Any) -> dict[str, Any]:
    """What a config says that its class doesn't by default."""
    changed = {}
    for each in fields(config):
        default = each.default if each.default is not MISSING else None
        if each.default_factory is not MISSING:
            default = each.default_factory()
        value = getattr(config, each.name)
        if (
            each.name not in _PLAIN
            and value != default
            and value not in (None, {}, [])
            and not isinstance(value, dict)
        ):
            changed[each.name] = sorted(value) if isinstance(value, set) else value
    return changed


def _formats(layers: dict[str, Any]) -> str:
    counts = Counter(_format_in_words(layer.number_format) for layer in layers.values())
    return "; ".join(f"{words} ({count} layers)" for words, count in counts.most_common(4)) + (
        "; others" if len(counts) > 4 else ""
    )


def _format_in_words(number_format: NumberFormat) -> str:
    groups = "per channel" if number_format.group_size == -1 else f"in groups of {number_format.group_size}"
    symmetric = ", symmetric" if isinstance(number_format, Uniform) and number_format.sym else ""
    zero = ", float zero points" if isinstance(number_format, Uniform) and number_format.zero == "float" else ""
    return f"{number_format.name} of {number_format.bits} bits, {groups}{symmetric}{zero}"


def _of_bits(layers: dict[str, Any]) -> str:
    widths = sorted({layer.bits for layer in layers.values()})
    return f" at {' and '.join(map(str, widths))} bits" if widths else ""


def _tags(layers: dict[str, Any]) -> list[str]:
    return [f"{bits}-bit" for bits in sorted({layer.bits for layer in layers.values()})] + ["quantized"] * bool(layers)


def _kind(config: Any, model: nn.Module) -> str:
    """How `peft_ext.load` is to load the base."""
    task = getattr(config.task_type, "value", config.task_type)
    if task == "CAUSAL_LM":
        return "causal"
    return _KINDS.get(str(task)) or _kind_of_class(model)


def _kind_of_class(model: nn.Module) -> str:
    name = type(model).__name__
    for kind, names in (
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("classifier", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ):
        if name in names.values():
            return kind
    return "encoder" if isinstance(model, PreTrainedModel) and not model.can_generate() else "other"


def _adapter_snippet(kind: str, base: str, subfolder: Optional[str]) -> str:
    if subfolder is not None:
        lines = [
            "import peft_ext",
            "from peft import PeftModel",
            "",
            f'base = peft_ext.load("{base}", kind="{"auto" if kind == "other" else kind}")',
            f'model = PeftModel.from_pretrained(base, "{SOURCE}", subfolder="{subfolder}")',
        ]
        rest = [] if kind == "other" else [f'tokenizer = peft_ext.load_tokenizer("{base}")', _use(kind)]
        return "\n".join([*lines, *rest])
    if kind == "other":
        return f'import peft_ext\n\nmodel = peft_ext.load("{SOURCE}", kind="auto")'
    argument = "" if kind == "causal" else f', kind="{kind}"'
    load = f'import peft_ext\n\nmodel = peft_ext.load("{SOURCE}"{argument})  # base and adapter'
    return f'{load}\ntokenizer = peft_ext.load_tokenizer("{SOURCE}")\n{_use(kind)}'


def _packed_snippet(model: PreTrainedModel, base: BaseModel, tokenizer_here: bool, pushed: bool) -> Optional[str]:
    import transformers

    kind = _kind_of_class(model)
    auto = {
        "causal": "AutoModelForCausalLM",
        "seq2seq": "AutoModelForSeq2SeqLM",
        "classifier": "AutoModelForSequenceClassification",
    }.get(kind, type(model).__name__)
    if not hasattr(transformers, auto):
        return None
    lines = [
        "import peft_ext  # the packed layers",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{SOURCE}")',
    ]
    if kind in ("other", "encoder"):
        return "\n".join([*lines, "print(model)"])
    if not tokenizer_here and base.name is None and not pushed:
        call = "model.generate(tokens, max_new_tokens=20)" if kind != "classifier" else "model(tokens).logits"
        lines[1:1] = ["import torch"]
        return "\n".join([*lines, "tokens = torch.tensor([[1, 2, 3]])  # of the base's tokenizer", f"print({call})"])
    if tokenizer_here or (pushed and not base.loads_elsewhere):
        note = "" if tokenizer_here else "  # if it was pushed as well: tokenizer.push_to_hub"
        lines.append(f'tokenizer = peft_ext.load_tokenizer("{SOURCE}"){note}')
    else:
        lines.append(f'tokenizer = peft_ext.load_tokenizer("{base.name}")')
    return "\n".join([*lines, _use(kind)])


def _use(kind: str) -> str:
    inputs = f'inputs = tokenizer("{PROMPT}", return_tensors="pt")'
    if kind in ("causal", "seq2seq"):
        return f"{inputs}\nprint(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
    result = "logits" if kind == "classifier" else "last_hidden_state"
    return f"{inputs}\nprint(model(**inputs).{result})"
