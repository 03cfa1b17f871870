# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The one place where peft-ext enters PEFT and transformers, through their own registries.

`PeftType` is a closed `str` enum and PEFT's `register_peft_method` asks for a member, so the member is added first.
Else of PEFT, `AutoPeftModel*.from_pretrained` asks us for an adapter's base, and LoRA's names for fused experts aren't put
in the place of those of experts that are unfused, and what it reads of an adapter of ours is checked (`adapter_files.py`);
of transformers we touch its quantizer registry, `load_adapter` and, for
model cards, what saves and uploads a model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method, transformers_weight_conversion
from transformers.integrations.peft import PeftAdapterMixin
from transformers.quantizers import auto


# Set on the members that we add: tells ours, after a reload, from one of a future PEFT.
_OWNER_ATTRIBUTE = "registered_by"
_OWNER = "peft_ext"
# All names that we add. If one of them is taken, none is added.
TUNERS = ("ALPHATUNING", "BOTTLENECK", "PEQA")


def register_tuner(name: str, config_cls: type, model_cls: type) -> PeftType:
    """Make a tuner a PEFT method; doing so again, or with reloaded classes, is harmless.

    Args:
        name: Lower-case name of the method; `PeftType.<NAME>` and the parameter prefix `<name>_` derive from it.
        config_cls: Its `PeftConfig`.
        model_cls: Its `BaseTuner`.

    Returns:
        The member of `PeftType`.

    Raises:
        ImportError: If the installed PEFT has a method of that name itself.
    """
    for taken in TUNERS:
        _check_not_taken(taken)
    member = _add_member(name.upper())
    # after a reload, the mappings must hold the classes of the modules that are now in sys.modules
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    return member


def register_quantizer(name: str, config_cls: type, quantizer_cls: type) -> None:
    """Make a checkpoint format a quantization method of transformers; again, or with reloaded classes, is harmless.

    Raises:
        ImportError: If the installed transformers has a method of that name itself.
    """
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        if name in mapping and not mapping[name].__module__.startswith(f"{_OWNER}."):
            raise ImportError(
                f"transformers {transformers.__version__} has a quantization method {name!r} of its own, which peft-ext "
                "would hide; install a peft-ext that is made for this version of transformers (pip install -U "
                "peft-ext)."
            )
        mapping.pop(name, None)
    auto.register_quantization_config(name)(config_cls)
    auto.register_quantizer(name)(quantizer_cls)


def extend_quantizer(name: str, quantizer_cls: type) -> None:
    """Let a subclass of one of transformers' own quantizers take its place; again, or with reloaded classes, is harmless.

    It must treat every checkpoint but ours as its base does.

    Raises:
        ImportError: If the quantizer in place is no base of it, since another package has put its own there.
    """
    current = auto.AUTO_QUANTIZER_MAPPING[name]
    if not current.__module__.startswith(f"{_OWNER}.") and not issubclass(quantizer_cls, current):
        raise ImportError(
            f"the quantization method {name!r} of transformers belongs to {current.__module__} already; import peft_ext "
            "before it, or without it."
        )
    auto.AUTO_QUANTIZER_MAPPING[name] = quantizer_cls


def extend_load_adapter(extended: Callable[[Callable], Callable]) -> None:
    """Wrap transformers' own `load_adapter`; again, or with a reloaded wrapper, is harmless.

    Args:
        extended: Makes the wrapper. It must treat every adapter but ours as what it wraps does.
    """
    extend_method(PeftAdapterMixin, "load_adapter", extended)


def extend_method(owner: Any, name: str, extended: Callable[[Callable], Callable]) -> None:
    """Wrap a method or function of theirs; again, or with a reloaded wrapper, is harmless.

    Args:
        owner: The class or module.
        name: The method, or the function under the name by which the module calls it.
        extended: Makes the wrapper, by `functools.wraps`. It must treat everything but ours as what it wraps does.
    """
    current = getattr(owner, name)
    if getattr(current, _OWNER_ATTRIBUTE, None) == _OWNER:
        current = current.__wrapped__
    wrapper = extended(current)
    setattr(wrapper, _OWNER_ATTRIBUTE, _OWNER)
    setattr(owner, name, wrapper)


def extend_class_method(owner: type, name: str, extended: Callable[[Callable], Callable]) -> None:
    """Wrap a class method of theirs, as [`extend_method`]; the wrapper takes the class first."""
    current = getattr(owner, name).__func__
    if getattr(current, _OWNER_ATTRIBUTE, None) == _OWNER:
        current = current.__wrapped__
    wrapper = extended(current)
    setattr(wrapper, _OWNER_ATTRIBUTE, _OWNER)
    setattr(owner, name, classmethod(wrapper))


def extend_static_method(owner: type, name: str, extended: Callable[[Callable], Callable]) -> None:
    """Wrap a static method of theirs, as [`extend_method`]."""
    extend_method(owner, name, extended)
    setattr(owner, name, staticmethod(getattr(owner, name)))


def keep_names_of_layers(has_layers: Callable[[Any], bool]) -> None:
    """Let PEFT take LoRA's targets and adapters as they are on models whose experts are layers; again is harmless.

    PEFT rewrites the names of single experts, which transformers 5 has fused, to those of the fused parameters.

    Args:
        has_layers: Says of a model whether its experts are layers.
    """

    def kept(function: Callable[..., Any], unchanged: Callable[..., Any]) -> None:
        own = getattr(function, "__wrapped__", function)

        @functools.wraps(own)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(own).bind(*args, **kwargs).arguments
            return unchanged(given) if has_layers(given["model"]) else own(*args, **kwargs)

        setattr(transformers_weight_conversion, own.__name__, wrapper)

    kept(transformers_weight_conversion.convert_peft_config_for_transformers, lambda given: None)
    kept(
        transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers,
        lambda given: given["adapter_state_dict"],
    )


def extend_auto_classes(base: Any, packed_base: Callable[..., Any]) -> None:
    """Let PEFT's `AutoPeftModel*.from_pretrained` ask for an adapter's base first; again, or with a reloaded function, is
    harmless.

    Args:
        base: The class that has their `from_pretrained`.
        packed_base: Takes the class, the adapter, `revision`, `import_allowlist` and the other keyword arguments; returns
            the base, or None for PEFT's own way.
    """
    own = base.from_pretrained.__func__
    if getattr(own, _OWNER_ATTRIBUTE, None) == _OWNER:
        own = own.__wrapped__

    @functools.wraps(own)
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: Any = None,
        import_allowlist: Any = None,
        **kwargs: Any,
    ) -> Any:
        model = packed_base(cls, pretrained_model_name_or_path, revision, import_allowlist, kwargs)
        adapter = {
            "adapter_name": adapter_name,
            "is_trainable": is_trainable,
            "config": config,
            "revision": revision,
            **kwargs,
        }
        if model is None:
            return own(cls, pretrained_model_name_or_path, import_allowlist=import_allowlist, **adapter)
        return cls._target_peft_class.from_pretrained(model, pretrained_model_name_or_path, **adapter)

    setattr(from_pretrained, _OWNER_ATTRIBUTE, _OWNER)
    base.from_pretrained = classmethod(from_pretrained)


def peft_type(value: str) -> PeftType:
    """The member of `PeftType`, once importing this module has added it: how members unpickle in a fresh process."""
    return PeftType(value)


def _check_not_taken(name: str) -> None:
    if name in PeftType.__members__ and getattr(PeftType[name], _OWNER_ATTRIBUTE, None) != _OWNER:
        raise ImportError(
            f"peft {peft.__version__} has a method {name} of its own, which peft-ext would hide. Use PEFT's, or "
            "install a peft-ext that is made for this version of PEFT (pip install -U peft-ext)."
        )


def _add_member(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    setattr(member, _OWNER_ATTRIBUTE, _OWNER)
    # a bare member may reach a process that has not imported peft_ext: unpickling imports it
    member.__reduce_ex__ = lambda protocol: (peft_type, (name,))
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member
