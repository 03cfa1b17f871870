# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Servers and pipelines of others on our models, asked by the `openai` client: is the text that of our own greedy
generation?

`transformers serve` behind `peft-ext run` on a packed base, on a base with an adapter in its folder, and merged; the
text-generation pipeline on an adapter's folder; llama.cpp's server (`pip install xllamacpp`) on our GGUF. Servers listen
on 127.0.0.1 alone, and are ended afterwards.

    python -m benchmarks serving
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, pipeline

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.ecosystem.common import Folders, adapted, gguf, prepare, server
from peft_ext.models import load_tokenizer


MESSAGES = [{"role": "user", "content": "Name three colours."}]
LLAMA_CPP = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.hostnames, parameters.n_ctx = ["127.0.0.1"], 512
server = xllamacpp.Server(parameters)
while True:
    time.sleep(1)
"""
NEEDED = {
    "transformers serve": ("fastapi", "uvicorn", "openai"),
    "llama.cpp": ("xllamacpp", "openai"),
}


def measure(run: Run) -> None:
    """Serve, ask, compare."""
    missing = [name for name in run.contenders if run.find({"contender": name}) is None]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(Path(folder) / "models", run.model)
        for name in missing:
            lacks = [each for each in _needed(name) if importlib.util.find_spec(each) is None]
            log(f"{name}{': not installed: ' + ', '.join(lacks) if lacks else ''}")
            if not lacks:
                run.add({"contender": name}, CONTENDERS[name](made, run.new_tokens))


def _needed(name: str) -> tuple[str, ...]:
    return next((packages for tool, packages in NEEDED.items() if name.startswith(tool)), ())


def serve_transformers(made: Folders, new_tokens: int, folder: Path, model: Any) -> dict[str, Any]:
    """`transformers serve` on a folder, beside the same model loaded by ourselves."""
    flags = ["transformers", "serve", folder, "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu"]
    start = time.perf_counter()
    with server(flags) as address:
        ready = time.perf_counter() - start
        answers = ask(address, str(folder), new_tokens)
    return {**answers, "ready_seconds": ready, "ours": our_text(model, made, new_tokens)}


def serve_base(made: Folders, new_tokens: int) -> dict[str, Any]:
    """A packed base."""
    return serve_transformers(made, new_tokens, made.base, AutoModelForCausalLM.from_pretrained(made.base))


def serve_embedded(made: Folders, new_tokens: int) -> dict[str, Any]:
    """A packed base with an adapter in its folder."""
    return serve_transformers(made, new_tokens, made.embedded, adapted(made))


def serve_merged(made: Folders, new_tokens: int) -> dict[str, Any]:
    """A merged model."""
    return serve_transformers(made, new_tokens, made.merged, AutoModelForCausalLM.from_pretrained(made.merged))


def run_pipeline(made: Folders, new_tokens: int) -> dict[str, Any]:
    """The text-generation pipeline on an adapter's folder."""
    generate = pipeline(
        "text-generation", model=str(made.adapter), tokenizer=load_tokenizer(str(made.base)), device="cpu"
    )
    found = generate(MESSAGES, max_new_tokens=new_tokens, do_sample=False, return_full_text=False)
    text = found[0]["generated_text"]
    return {"whole": text, "streamed": text, "ours": our_text(adapted(made), made, new_tokens)}


def serve_llama_cpp(made: Folders, new_tokens: int) -> dict[str, Any]:
    """llama.cpp's server (in xllamacpp's wheel) on the exported GGUF, which knows nothing of us."""
    start = time.perf_counter()
    with server([str(gguf(made)), "{port}"], "/v1/models", ("-c", LLAMA_CPP)) as address:
        ready = time.perf_counter() - start
        answers = ask(address, "model", new_tokens)
    model = AutoModelForCausalLM.from_pretrained(made.merged)
    return {**answers, "ready_seconds": ready, "ours": our_text(model, made, new_tokens)}


CONTENDERS: dict[str, Callable[[Folders, int], dict[str, Any]]] = {
    "transformers serve, packed base": serve_base,
    "transformers serve, adapter in the base's folder": serve_embedded,
    "transformers serve, merged": serve_merged,
    "text-generation pipeline, adapter folder": run_pipeline,
    "llama.cpp server, our GGUF": serve_llama_cpp,
}


def ask(address: str, model: str, new_tokens: int) -> dict[str, Any]:
    """The answer of a server, at once and streamed."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)
    options: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": new_tokens, "temperature": 0.0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = []
    for chunk in client.chat.completions.create(stream=True, **options):
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
    return {"whole": whole, "streamed": "".join(parts), "chunks": len(parts)}


@torch.no_grad()
def our_text(model: Any, made: Folders, new_tokens: int) -> str:
    """Greedy generation by ourselves."""
    tokenizer = load_tokenizer(str(made.base))
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def tables(run: Run) -> dict[str, str]:
    """Whether texts are ours, by server."""
    lines = []
    for row in run.rows:
        found = row["result"]
        streamed, ready = found["streamed"].strip() == found["whole"].strip(), found.get("ready_seconds")
        texts = ["yes" if _is_ours(found) else "no", "yes" if streamed else "no", found.get("chunks")]
        lines.append([row["key"]["contender"], *texts, ready and f"{ready:.0f}"])
    headers = ["Server", "Text is ours", "Streamed text is the whole one", "Chunks", "Ready after, s"]
    return {f"{run.new_tokens} tokens, greedy": markdown_table(headers, lines)}


def _is_ours(found: dict[str, Any]) -> bool:
    return found["whole"].strip() == found["ours"].strip()


def claims(run: Run) -> list[Claim]:
    """Every tool's text is ours."""
    found = [_is_ours(row["result"]) for row in run.rows]
    return [Claim("share of tools whose text is ours", sum(found) / len(found) if found else None, 1.0, at_least=True)]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
