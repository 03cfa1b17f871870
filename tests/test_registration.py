# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`import peft_ext` makes its tuners PEFT methods: lookups, repeated imports, reloads, forks, pickles, name
clashes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

import peft_ext
from peft_ext import AlphaTuningConfig, AlphaTuningModel, PeqaConfig, PeqaModel
from peft_ext.registration import TUNERS
from tests.tiny.models import tiny


CLASSES = [(PeqaConfig, PeqaModel), (AlphaTuningConfig, AlphaTuningModel)]


@pytest.mark.parametrize("name", TUNERS)
def test_the_member(name):
    member = getattr(PeftType, name)
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member == name and member.value == name and member.name == name
    assert PeftType(name) is member and PeftType[name] is member
    assert member in PeftType and member in list(PeftType)
    assert list(PeftType)[-len(TUNERS) :] == list(TUNERS) and len(PeftType) == len(set(PeftType))
    assert hash(member) == hash(name) and {member: 1}[name] == 1
    assert str(member) == str(PeftType.LORA).replace("LORA", name)
    assert repr(member) == repr(PeftType.LORA).replace("LORA", name)
    assert json.dumps(member) == f'"{name}"'


def test_the_member_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        PeftType.PEQA = "other"


def test_other_members_are_as_they_were():
    assert PeftType.LORA.value == "LORA" and PeftType("LORA") is PeftType.LORA
    assert pickle.loads(pickle.dumps(PeftType.LORA)) is PeftType.LORA
    with pytest.raises(ValueError, match="NOBODY"):
        PeftType("NOBODY")


@pytest.mark.parametrize("config_cls, model_cls", CLASSES)
def test_mappings(config_cls, model_cls):
    member = config_cls().peft_type
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config_cls
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member.value] is config_cls
    assert PEFT_TYPE_TO_TUNER_MAPPING[member.value] is model_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member.value] == f"{member.value.lower()}_" == model_cls.prefix
    assert member not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


@pytest.mark.parametrize("config_cls", [config_cls for config_cls, _ in CLASSES])
def test_get_peft_config(config_cls):
    member = config_cls().peft_type
    config = get_peft_config({"peft_type": member.value, "bits": 3, "task_type": "CAUSAL_LM"})
    assert isinstance(config, config_cls) and config.bits == 3
    assert config.peft_type is member


@pytest.mark.parametrize("config_cls", [config_cls for config_cls, _ in CLASSES])
def test_config_classes_of_peft(config_cls, tmp_path):
    config_cls(bits=2, group_size=32).save_pretrained(tmp_path)
    for cls in (PeftConfig, config_cls):
        config = cls.from_pretrained(tmp_path)
        assert type(config) is config_cls and config.bits == 2 and config.group_size == 32


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(protocol):
    assert pickle.loads(pickle.dumps(PeftType.PEQA, protocol)) is PeftType.PEQA
    config = PeqaConfig(bits=3, target_modules=["q_proj"], bits_pattern={"q_proj": 4})
    twin = pickle.loads(pickle.dumps(config, protocol))
    assert twin == config and twin.peft_type is PeftType.PEQA


def test_copies():
    assert copy.copy(PeftType.PEQA) is PeftType.PEQA and copy.deepcopy(PeftType.PEQA) is PeftType.PEQA
    config = PeqaConfig(target_modules=["q_proj"])
    twin = copy.deepcopy(config)
    assert twin == config and twin.target_modules is not config.target_modules


def test_pickles_open_in_a_process_that_has_not_imported_us(tmp_path, fresh_process):
    """As with a `spawn`ed data loader worker or a torch.save'd TrainingArguments: unpickling imports what it needs."""
    with open(tmp_path / "objects.pkl", "wb") as file:
        pickle.dump([PeftType.PEQA, {"type": PeftType.PEQA}], file)
    with open(tmp_path / "config.pkl", "wb") as file:
        pickle.dump(PeqaConfig(bits=3), file)
    code = """
import pickle, sys
from pathlib import Path
from peft.utils import PeftType
assert "peft_ext" not in sys.modules and not hasattr(PeftType, "PEQA")
member, nested = pickle.loads(Path(sys.argv[1], "objects.pkl").read_bytes())
assert member is PeftType.PEQA is nested["type"]
config = pickle.loads(Path(sys.argv[1], "config.pkl").read_bytes())
assert config.bits == 3 and config.peft_type is member
print("opened")
"""
    assert fresh_process(code, tmp_path).strip() == "opened"


def test_import_twice_and_reload(fresh_process):
    """In a process of its own: a reload makes new classes, which other tests must not meet."""
    code = """
import importlib, pickle, sys
import peft_ext, peft_ext
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tests.tiny.models import tiny

before, member = len(PeftType), PeftType.PEQA
old = pickle.dumps(peft_ext.PeqaConfig(bits=3))
old_config = peft_ext.PeqaConfig(bits=3, target_modules=["lin0"])
importlib.reload(peft_ext)
for name in [name for name in sys.modules if name.startswith("peft_ext.")]:
    importlib.reload(sys.modules[name])
importlib.reload(peft_ext)
assert len(PeftType) == before and PeftType.PEQA is member
get_peft_model(tiny("mlp"), peft_ext.PeqaConfig(target_modules=["lin0"]))

for name in [name for name in sys.modules if name.split(".")[0] == "peft_ext"]:
    del sys.modules[name]
import peft_ext
assert len(PeftType) == before and PeftType.PEQA is member
assert PEFT_TYPE_TO_CONFIG_MAPPING["PEQA"] is peft_ext.PeqaConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["PEQA"] is peft_ext.PeqaModel
assert type(pickle.loads(old)) is peft_ext.PeqaConfig
get_peft_model(tiny("mlp"), peft_ext.PeqaConfig(target_modules=["lin0"]))
get_peft_model(tiny("mlp"), old_config)
print("fine")
"""
    assert fresh_process(code).strip() == "fine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_fork(tmp_path):
    pid = os.fork()
    if pid == 0:  # the child must leave without running pytest's own clean-up
        status = 1
        try:
            good = PeftType("PEQA") is PeftType.PEQA and get_peft_config({"peft_type": "PEQA"}) == PeqaConfig()
            good = good and pickle.loads(pickle.dumps(PeftType.PEQA)) is PeftType.PEQA
            model = get_peft_model(tiny("mlp"), PeqaConfig(target_modules=["lin0"]))
            good = good and model(torch.zeros(2, 10)).shape == (2, 2)
            status = 0 if good else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("name", TUNERS)
def test_a_future_peft_that_has_the_name(name, fresh_process):
    """Then ours must step back with a clear error, and leave PEFT as it is."""
    code = """
import enum, sys
import peft.utils.peft_types as peft_types
name = sys.argv[1]

members = {member.name: member.value for member in peft_types.PeftType}
theirs = enum.Enum("PeftType", {**members, name: name}, type=str)
import peft, peft.utils, peft.config, peft.mapping
for module in (peft_types, peft, peft.utils, peft.config, peft.mapping):
    if hasattr(module, "PeftType"):
        module.PeftType = theirs
try:
    import peft_ext
except ImportError as error:
    assert name in str(error) and peft.__version__ in str(error), error
    print("refused")
assert len(theirs) == len(members) + 1
assert not {"PEQA", "ALPHATUNING", "BOTTLENECK"} & set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
"""
    assert fresh_process(code, name).strip() == "refused"


def test_nothing_else_of_peft_changes(fresh_process):
    """No function or class of PEFT is replaced but where it writes, opens and takes over an adapter's file
    (which tests/test_adapter_files.py shows to be as ever for other tuners), no mapping entry of another method touched."""
    code = """
import sys, types
import peft
from peft import mapping, PeftType

def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "peft" and isinstance(module, types.ModuleType):
            for key, value in vars(module).items():
                if isinstance(value, (type, types.FunctionType)):
                    found[name, key] = value
                    if isinstance(value, type) and value.__module__.startswith("peft") and value is not PeftType:
                        found.update({(name, key, k): v for k, v in vars(value).items() if callable(v)})
    return found

tables = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING",
          "PEFT_TYPE_TO_MIXED_MODEL_MAPPING")
before, maps = snapshot(), {name: dict(getattr(mapping, name)) for name in tables}
members = list(PeftType)
import peft_ext
after = snapshot()
changed = [key for key, value in before.items() if after.get(key) is not value]
changed = [key for key in changed if key[1:] != ("PeftModel", "save_pretrained")]  # ours are written whole
changed = [key for key in changed if key[-1] != "get_nb_trainable_parameters"]  # codes count as weights
looked_into = [("peft.utils.save_and_load", "safe_load_file"), ("peft.utils.save_and_load", "torch_load"),
               ("peft.peft_model", "set_peft_model_state_dict"), ("peft.peft_model", "load_peft_weights"),
               ("peft.utils.save_and_load", "has_valid_embedding_base_layer")]
assert sorted(changed) == sorted(looked_into), changed
for name, table in maps.items():
    assert {k: v for k, v in getattr(mapping, name).items() if k not in ("PEQA", "ALPHATUNING", "BOTTLENECK")} == table, name
assert list(PeftType)[:-3] == members
print("untouched")
"""
    assert fresh_process(code).strip() == "untouched"


def test_importing_warns_about_nothing_and_is_quiet(fresh_process):
    code = """
import warnings
warnings.simplefilter("error")
import peft_ext
"""
    assert fresh_process(code) == ""


def test_public_names():
    assert {"AlphaTuningConfig", "AlphaTuningModel", "PeqaConfig", "PeqaModel", "calibrate"} <= set(peft_ext.__all__)
    for name in peft_ext.__all__:
        assert getattr(peft_ext, name) is not None
    assert peft_ext.__version__


def test_methods_of_peft_still_work():
    model = get_peft_model(tiny("mlp"), peft.LoraConfig(target_modules=["lin0"]))
    assert isinstance(model, PeftModel)
    assert model(torch.zeros(1, 10)).shape == (1, 2)


def test_pip_check_has_nothing_to_say_about_us():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert not [line for line in done.stdout.splitlines() if line.startswith("peft-ext ")]


def test_a_future_transformers_that_has_the_format():
    from transformers.quantizers import auto

    from peft_ext.checkpoint import BcqConfig, BcqHfQuantizer
    from peft_ext.registration import register_quantizer

    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bcq"] is BcqConfig
    register_quantizer("bcq", BcqConfig, BcqHfQuantizer)  # again: harmless
    assert auto.AUTO_QUANTIZER_MAPPING["bcq"] is BcqHfQuantizer
    with pytest.raises(ImportError, match="transformers .* has a quantization method 'gptq' of its own"):
        register_quantizer("gptq", BcqConfig, BcqHfQuantizer)
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is not BcqConfig
