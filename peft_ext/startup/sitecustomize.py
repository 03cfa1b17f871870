# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What Python runs at the start of a process whose PYTHONPATH has this folder, as `peft-ext run` sets it: `peft_ext` is
imported just before transformers or PEFT are.

Not at once: most processes that a tool starts (helpers of multiprocessing, compilers) import neither, and for them the
seconds and the memory would be wasted. Other interpreters may see the folder too, so this file stands alone, and does
nothing where there is no `peft_ext`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


# What `peft_ext` imports of those that import transformers themselves: begun first by somebody else, it would be found
# half made.
TRIGGERS = ("transformers", "peft", "compressed_tensors")
# lm-evaluation-harness has no entry points for models; its registry takes names that are imported when asked for.
HARNESS_MODELS, HARNESS_REGISTRY = "lm_eval.models", "lm_eval.api.registry"
HARNESS_BACKENDS = {"peft_ext": "generation_ext.in_context.lm_eval:SharedPrefixLM"}


class Registration(importlib.abc.MetaPathFinder):
    """Imports `peft_ext` before the first import of a trigger goes on."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in TRIGGERS:
            return None
        sys.meta_path.remove(self)
        # a process that imports it by itself is on the way already
        if "peft_ext" in sys.modules or importlib.util.find_spec("peft_ext") is None:
            return None
        importlib.import_module("peft_ext")
        if fullname not in sys.modules:
            return None
        module = sys.modules[fullname]
        answer = importlib.machinery.ModuleSpec(fullname, _Imported(module.__spec__))
        # where a module has a spec, Python takes it in place of ours, and would run the module again
        module.__spec__ = None
        return answer


class _Imported(importlib.abc.Loader):
    """Answers an import with the module that has been imported meanwhile."""

    def __init__(self, spec):
        self.spec = spec

    def create_module(self, spec):
        return sys.modules[spec.name]

    def exec_module(self, module):
        module.__spec__ = self.spec


class HarnessBackends(importlib.abc.MetaPathFinder):
    """Adds our models to the registry of lm-evaluation-harness once it has filled it with its own."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != HARNESS_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, register_harness_backends)
        return spec


class _Followed(importlib.abc.Loader):
    """A loader, and what is done after it."""

    def __init__(self, loader, then):
        self.loader, self.then = loader, then

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        # the module's own again: its files and its source are asked for
        module.__loader__ = module.__spec__.loader = self.loader
        self.then()


def register_harness_backends():
    """Makes `--model peft_ext` known to an imported lm-evaluation-harness."""
    registry = importlib.import_module(HARNESS_REGISTRY).model_registry
    for name, target in HARNESS_BACKENDS.items():
        if name not in registry:
            registry.register(name, target=target)


def watch():
    """From now on, what is imported in this process meets our methods."""
    if not any(isinstance(finder, Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, Registration())
    if HARNESS_MODELS in sys.modules:
        register_harness_backends()
    elif not any(isinstance(finder, HarnessBackends) for finder in sys.meta_path):
        sys.meta_path.insert(0, HarnessBackends())


def run_shadowed():
    """Runs the `sitecustomize` that Python would have found without ours, as Python would have."""
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    watch()
    run_shadowed()
