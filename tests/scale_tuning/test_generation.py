# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`generate` through the kernel: a static cache and torch.compile give the text that eager generation gives."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.quant import kernel
from tests.cases import move_adapter
from tests.tiny.models import inputs, tiny


CONFIGS = {
    "peqa": PeqaConfig(bits=3, task_type="CAUSAL_LM"),
    "peqa-groups": PeqaConfig(bits=4, group_size=16, task_type="CAUSAL_LM"),
    "alphatuning": AlphaTuningConfig(bits=2, task_type="CAUSAL_LM"),
}


@pytest.fixture(params=["merged", "beside the base"])
def merged(request):
    return request.param == "merged"


@pytest.mark.parametrize("name", CONFIGS)
def test_static_cache_and_compile(name, merged, monkeypatch):
    torch._dynamo.reset()
    model = get_peft_model(tiny("llama"), CONFIGS[name]).eval()
    move_adapter(model, strength=0.3)
    model = model.merge_and_unload() if merged else model
    batch = inputs("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    static = model.generate(**batch, **options, cache_implementation="static")
    assert static.tolist() == expected.tolist()

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    inner = model if merged else model.get_base_model()
    monkeypatch.setattr(inner, "forward", torch.compile(inner.forward, fullgraph=True, backend=backend))
    compiled = model.generate(**batch, **options, cache_implementation="static")
    assert compiled.tolist() == expected.tolist()
    assert graphs, "nothing was compiled"
    if kernel.available():
        calls = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
        assert any("peft_ext" in call for call in calls), "the kernel is no operator of the graph"
