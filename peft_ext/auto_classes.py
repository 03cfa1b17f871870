# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PEFT's `AutoPeftModel*.from_pretrained(adapter)` on a base that somebody else has packed: the base stays packed.

PEFT loads the base by plain `from_pretrained`, which makes floats of it, or asks for a package. Where the base is one that
[`peft_ext.load_packed`] reads, an adapter of ours goes onto the packed base; an adapter of another method does where
stock transformers can't load the base for it. Everything else goes PEFT's own way.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Optional

from peft import PeftConfig
from peft.auto import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    _BaseAutoPeftModel,
    check_import_allowlist,
    get_default_import_allowlist,
)
from peft.utils.other import check_file_exists_on_hf_hub
from transformers import AutoTokenizer
from transformers.utils import is_auto_round_available, is_gptqmodel_available

from peft_ext.checkpoint.loading import load_packed, stored_quantization
from peft_ext.registration import TUNERS, extend_auto_classes


def packed_base(
    cls: Any,
    pretrained_model_name_or_path: Any,
    revision: Optional[str],
    import_allowlist: Optional[list[str]],
    kwargs: dict[str, Any],
) -> Any:
    """The base of an adapter as [`load_packed`] loads it; None where PEFT is to load it in its own way.

    Args:
        cls: PEFT's class, such as `AutoPeftModelForCausalLM`.
        pretrained_model_name_or_path, revision, import_allowlist, kwargs: What its `from_pretrained` was called with.
    """
    config: Any = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
    target = _target_class(cls, config, import_allowlist)
    if target is None or not _goes_packed(config, kwargs):
        return None
    base: Any = load_packed(config.base_model_name_or_path, target, revision=config.revision, **kwargs)
    tokens = _tokens_of(pretrained_model_name_or_path, revision, kwargs)
    if tokens > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(tokens)
    return base


def _target_class(cls: Any, config: Any, import_allowlist: Optional[list[str]]) -> Any:
    """The class of the base, as PEFT finds it; None where it can't, and then its own `from_pretrained` says why."""
    if config.task_type is not None:
        expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type)
        return cls._target_class if cls._target_peft_class is expected else None
    if not config.auto_mapping:
        return None
    library = config.auto_mapping["parent_library"]
    if not check_import_allowlist(import_allowlist or get_default_import_allowlist(), library):
        return None
    return getattr(importlib.import_module(library), config.auto_mapping["base_model_class"], None)


def _goes_packed(config: Any, kwargs: dict[str, Any]) -> bool:
    if not config.base_model_name_or_path:
        return False
    try:
        stored = stored_quantization(config.base_model_name_or_path, **{**kwargs, "revision": config.revision})
    except (
        OSError,
        ValueError,
    ):  # no model of transformers', or nothing: PEFT's own way loads it or says what is missing
        return False
    if stored is None or kwargs.get("quantization_config") is not None:
        return False
    return config.peft_type.value in TUNERS or not _stock_loads(stored)


def _stock_loads(stored: dict[str, Any]) -> bool:
    """Whether transformers itself loads a base with this quantization config here, so that an adapter goes onto it."""
    method = stored["quant_method"]
    if method == "compressed-tensors":  # layers have no weight before the first forward, zero points no room
        return bool(stored.get("dequantize"))
    if method == "gguf":  # transformers wants the file's name apart from its folder, which an adapter doesn't say
        return False
    return is_auto_round_available() if "auto-round" in method else is_gptqmodel_available()


def _tokens_of(folder: Any, revision: Optional[str], kwargs: dict[str, Any]) -> int:
    """Number of tokens of the tokenizer that lies beside an adapter; 0 if there is none."""
    name, token = "tokenizer_config.json", kwargs.get("token")
    here = Path(folder).is_dir()
    if not (
        Path(folder, name).is_file()
        if here
        else check_file_exists_on_hf_hub(
            repo_id=str(folder), filename=name, revision=revision, repo_type=kwargs.get("repo_type"), token=token
        )
    ):
        return 0
    trust = kwargs.get("trust_remote_code", False)
    return len(AutoTokenizer.from_pretrained(folder, revision=revision, token=token, trust_remote_code=trust))


extend_auto_classes(_BaseAutoPeftModel, packed_base)
