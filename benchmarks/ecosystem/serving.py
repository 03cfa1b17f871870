# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Servers and pipelines of others on our models, asked by the `openai` client: is the text that of our own greedy
generation?

`transformers serve` behind `peft-ext run` on a packed base, on a base with an adapter in its folder, and merged; the
text-generation pipeline on an adapter's folder; llama.cpp's server (`pip install xllamacpp`) on our GGUF. Servers listen
on 127.0.0.1 alone, and are ended afterwards.

    python -m benchmarks.ecosystem.serving
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import AutoModelForCausalLM, pipeline

from benchmarks.common import Results, argument_parser, describe, log, markdown_table
from benchmarks.ecosystem.common import Folders, adapted, gguf, prepare, server
from peft_ext.models import DEFAULT_MODEL, load_tokenizer


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


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Serve, ask, compare, print."""
    parser = argument_parser(__doc__, "ecosystem_serving.json", budget={"new_tokens": 24})
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument("--only", nargs="+", help="names of contenders")
    args = parser.parse_args(argv)
    if args.smoke:
        args.new_tokens = 2
    results = Results(args.output, args.seed)
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            made = prepare(Path(folder) / "models", args.model)
            for name, measure in CONTENDERS.items():
                settings = {"contender": name, "model": args.model, "new_tokens": args.new_tokens}
                if results.find(settings) is None and (not args.only or name in args.only):
                    missing = [each for each in _needed(name) if importlib.util.find_spec(each) is None]
                    log(f"{name}{': not installed: ' + ', '.join(missing) if missing else ''}")
                    if not missing:
                        results.add(settings, measure(made, args))
    print(_table(results))


def _needed(name: str) -> tuple[str, ...]:
    return next((packages for tool, packages in NEEDED.items() if name.startswith(tool)), ())


def serve_transformers(made: Folders, args: argparse.Namespace, folder: Path, model: Any) -> dict[str, Any]:
    """`transformers serve` on a folder, beside the same model loaded by ourselves."""
    flags = ["transformers", "serve", folder, "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu"]
    start = time.perf_counter()
    with server(flags) as address:
        ready = time.perf_counter() - start
        answers = ask(address, str(folder), args.new_tokens)
    return {**answers, "ready_seconds": ready, "ours": our_text(model, made, args.new_tokens)}


def serve_base(made: Folders, args: argparse.Namespace) -> dict[str, Any]:
    """A packed base."""
    return serve_transformers(made, args, made.base, AutoModelForCausalLM.from_pretrained(made.base))


def serve_embedded(made: Folders, args: argparse.Namespace) -> dict[str, Any]:
    """A packed base with an adapter in its folder."""
    return serve_transformers(made, args, made.embedded, adapted(made))


def serve_merged(made: Folders, args: argparse.Namespace) -> dict[str, Any]:
    """A merged model."""
    return serve_transformers(made, args, made.merged, AutoModelForCausalLM.from_pretrained(made.merged))


def run_pipeline(made: Folders, args: argparse.Namespace) -> dict[str, Any]:
    """The text-generation pipeline on an adapter's folder."""
    generate = pipeline(
        "text-generation", model=str(made.adapter), tokenizer=load_tokenizer(str(made.base)), device="cpu"
    )
    found = generate(MESSAGES, max_new_tokens=args.new_tokens, do_sample=False, return_full_text=False)
    text = found[0]["generated_text"]
    return {"whole": text, "streamed": text, "ours": our_text(adapted(made), made, args.new_tokens)}


def serve_llama_cpp(made: Folders, args: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp's server (in xllamacpp's wheel) on the exported GGUF, which knows nothing of us."""
    start = time.perf_counter()
    with server([str(gguf(made)), "{port}"], "/v1/models", ("-c", LLAMA_CPP)) as address:
        ready = time.perf_counter() - start
        answers = ask(address, "model", args.new_tokens)
    model = AutoModelForCausalLM.from_pretrained(made.merged)
    return {**answers, "ready_seconds": ready, "ours": our_text(model, made, args.new_tokens)}


CONTENDERS: dict[str, Callable[[Folders, argparse.Namespace], dict[str, Any]]] = {
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


def _table(results: Results) -> str:
    lines = []
    for row in results.rows:
        found = row["result"]
        same = found["whole"].strip() == found["ours"].strip()
        streamed = found["streamed"].strip() == found["whole"].strip()
        ready = found.get("ready_seconds")
        texts = ["yes" if same else "no", "yes" if streamed else "no", found.get("chunks")]
        lines.append([row["settings"]["contender"], *texts, ready and f"{ready:.0f}"])
    headers = ["Server", "Text is ours", "Streamed text is the whole one", "Chunks", "Ready after, s"]
    parts = [markdown_table(headers, lines)]
    return "\n\n".join([*parts, describe(results.rows[-1]["environment"])] if results.rows else parts)


if __name__ == "__main__":
    sys.exit(main())
