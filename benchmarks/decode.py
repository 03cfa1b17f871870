# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Generation on a CPU: tokens per second, time to the first token and peak memory of packed models and of their peers.

Every contender is a process of its own that loads its checkpoint, and is then asked in turn: a round is one measurement of
each, and figures are medians of rounds. llama.cpp runs our GGUF export of the very same packed model.

    python -m benchmarks.decode

A model's contenders are stored together when its last round is done. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from benchmarks.common import RESULTS, ROOT, Results, describe, log, markdown_table, verdict
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import tiny_llama
from peft_ext import PeqaConfig
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
from peft_ext.quant.kernel import KERNEL_VARIABLE
from peft_ext.text import PYTHON_DOCS, load_text


ONE_BILLION, SMOKE = "random Llama, 1.07 billion", "smoke"
MODELS = (DEFAULT_MODEL, ONE_BILLION)
MB = 1e6


# What plain `save_pretrained` writes (compressed-tensors); the other packed ones are `bcq`.
SAVED_CHECKPOINT = "4 bits, compressed-tensors"


class Contender(NamedTuple):
    """Who generates."""

    checkpoint: str  # a folder of `prepare`
    dtype: str = "bfloat16"
    compiled: bool = False  # with a static cache
    adapter: bool = False  # a new one beside the packed base, instead of merged into it
    llama_cpp: bool = False
    packed_here: bool = False  # the float checkpoint, packed to 4 bits in this process: never saved

    @property
    def title(self) -> str:
        """A row's first column."""
        if self.llama_cpp:
            return f"llama.cpp on our GGUF, {self.checkpoint}"
        if self.packed_here:
            return f"PEQA, 4 bits, {self.dtype}, never saved"
        if self.checkpoint == SAVED_CHECKPOINT:
            return f"PEQA, 4 bits, {self.dtype}, saved, loaded in a fresh process"
        name = "transformers" if self.checkpoint == "float" else f"PEQA, {self.checkpoint}"
        notes = [", static cache and torch.compile"] * self.compiled + [", adapter beside the base"] * self.adapter
        return f"{name}, {self.dtype}{''.join(notes)}"


FLOAT32, BFLOAT16 = Contender("float", "float32"), Contender("float")
COMPILED = Contender("float", compiled=True)
FOUR, TWO = Contender("4 bits"), Contender("2 bits")
NEVER_SAVED, SAVED = Contender("float", packed_here=True), Contender(SAVED_CHECKPOINT)
LLAMA_CPP = Contender("4 bits", llama_cpp=True)
CONTENDERS = (
    FLOAT32,
    BFLOAT16,
    COMPILED,
    FOUR,
    Contender("3 bits"),
    TWO,
    Contender("4 bits", "float32"),
    Contender("4 bits", compiled=True),
    Contender("4 bits", adapter=True),
    NEVER_SAVED,
    SAVED,
    LLAMA_CPP,
)


# Name -> bits.
_CHECKPOINTS = {"float": None, "4 bits": 4, SAVED_CHECKPOINT: 4, "3 bits": 3, "2 bits": 2}


def prepare(model: str, folder: Path) -> None:
    """Write the checkpoints of a model that all contenders load: floats in bfloat16, packed ones, and a GGUF."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    for name, bits in _CHECKPOINTS.items():
        if (folder / name).is_dir():
            continue
        torch.manual_seed(0)
        loaded = _build(model) if bits is None else AutoModelForCausalLM.from_pretrained(folder / "float")
        if bits is not None:
            loaded = get_peft_model(loaded, PeqaConfig(bits=bits)).merge_and_unload()
            if name != SAVED_CHECKPOINT:
                make_saveable(loaded, "bcq")
        partial = folder / f"{name}.partial"
        loaded.save_pretrained(partial)
        if name == LLAMA_CPP.checkpoint:
            export_gguf(loaded, tokenizer, partial / "model.gguf")
        partial.rename(folder / name)


def _build(model: str) -> PreTrainedModel:
    if model == SMOKE:
        return tiny_llama(seed=0).bfloat16()
    if model != ONE_BILLION:
        return load(model).bfloat16()
    config = LlamaConfig(
        vocab_size=len(load_tokenizer(DEFAULT_MODEL)),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def prompt_of(length: int, vocab_size: int) -> list[int]:
    """Tokens of Python's documentation."""
    text = "\n\n".join(load_text(PYTHON_DOCS).train[:20])
    return [token % vocab_size for token in load_tokenizer(DEFAULT_MODEL)(text).input_ids[:length]]


# What measures: prompt and number of tokens -> seconds to the first token, seconds to the last.
Generate = Callable[[list[int], int], tuple[float, float]]


def transformers_generate(contender: Contender, folder: Path) -> Generate:
    """Greedy `model.generate`."""
    dtype = getattr(torch, contender.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if contender.packed_here:
        model = get_peft_model(model, PeqaConfig(bits=4)).merge_and_unload().eval()
    if contender.adapter:
        model = get_peft_model(model, PeqaConfig(bits=4, inference_mode=True)).eval()
    options: dict[str, Any] = {"do_sample": False}
    if contender.compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward, fullgraph=True)

    def generate(prompt: list[int], count: int) -> tuple[float, float]:
        ids, clock = torch.tensor([prompt]), Clock()
        begin = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            streamer=clock,
            **options,
        )
        return clock.times[1] - begin, clock.times[-1] - begin  # the first call brings the prompt

    return generate


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def llama_cpp_generate(folder: Path, length: int) -> Generate:
    """Greedy, by llama.cpp's own loop."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(
        str(folder / "model.gguf"), n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False, seed=0
    )

    def generate(prompt: list[int], count: int) -> tuple[float, float]:
        model.reset()
        begin = time.perf_counter()
        tokens = model.generate(prompt, temp=0.0)
        next(tokens)
        first = time.perf_counter() - begin
        for _ in range(count - 1):
            next(tokens)
        return first, time.perf_counter() - begin

    return generate


def serve(contender: Contender, folder: Path, prompt_length: int, new_tokens: int) -> None:
    """A contender's process: load, then a JSON line of figures for each line read."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text())
    prompt = prompt_of(prompt_length, config["vocab_size"])
    if contender.llama_cpp:
        import llama_cpp  # noqa: F401 - the library's own memory isn't the model's
    reset_peak()
    before = resident_bytes()
    if contender.llama_cpp:
        generate = llama_cpp_generate(folder, prompt_length + new_tokens)
    else:
        generate = transformers_generate(contender, folder)
    generate(prompt, new_tokens)  # compiles, fills caches
    print("ready", flush=True)
    for _ in sys.stdin:
        first, whole = generate(prompt, new_tokens)
        figures = {
            "first_token_seconds": first,
            "tokens_per_second": (new_tokens - 1) / (whole - first),
            "peak_bytes": peak_resident_bytes() - before,
        }
        print(json.dumps(figures), flush=True)


def measure(args: argparse.Namespace, model: str, folder: Path) -> dict[str, dict[str, Any]]:
    """All contenders in turn: medians, and all values, by title."""
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for contender in chosen(args):
            log(f"{model}: loading {contender.title}")
            processes[contender.title] = process = _start(args, contender, folder / contender.checkpoint)
            _answer(process, contender)  # one after the other, so that loading and compiling don't compete
        rounds: dict[str, list[dict[str, float]]] = {title: [] for title in processes}
        for number in range(args.rounds):
            log(f"{model}: round {number + 1} of {args.rounds}")
            for contender in chosen(args):
                process = processes[contender.title]
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                rounds[contender.title].append(json.loads(_answer(process, contender)))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    sizes = {name: _weight_bytes(folder / name) for name in _CHECKPOINTS}
    return {
        contender.title: {
            **{
                key: statistics.median(row[key] for row in rounds[contender.title])
                for key in rounds[contender.title][0]
            },
            "weight_bytes": _gguf_bytes(folder) if contender.llama_cpp else sizes[contender.checkpoint],
            "rounds": rounds[contender.title],
        }
        for contender in chosen(args)
    }


def _start(args: argparse.Namespace, contender: Contender, folder: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.decode",
        "--serve",
        json.dumps([*contender]),
        "--work_dir",
        str(folder),
    ]
    command += ["--prompt_tokens", str(args.prompt_tokens), "--new_tokens", str(args.new_tokens)]
    # freed memory is handed back at once, so that peaks are of tensors; the CPU kernel in its default mode
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        KERNEL_VARIABLE: "auto",
    }
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)


def _answer(process: subprocess.Popen[str], contender: Contender) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{contender.title}: its process ended with {process.wait()}, see above.")
    return line


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _gguf_bytes(folder: Path) -> int:
    return (folder / LLAMA_CPP.checkpoint / "model.gguf").stat().st_size


def chosen(args: argparse.Namespace) -> list[Contender]:
    """The contenders to measure."""
    wanted = [contender for contender in CONTENDERS if not args.rows or contender.title in args.rows]
    if any(contender.llama_cpp for contender in wanted):
        try:
            import llama_cpp  # noqa: F401
        except ImportError:
            log("llama.cpp is left out: pip install 'peft-ext[bench]' (llama-cpp-python)")
            wanted.remove(LLAMA_CPP)
    return wanted


def print_tables(output: Path) -> None:
    """A table for each model, and what was to be reached."""
    for row in Results(output, seed=0).rows:
        settings, found = row["settings"], row["result"]
        print(
            f"\n{settings['model']}: {settings['prompt_tokens']} tokens in, {settings['new_tokens']} out, greedy, "
            f"batch of 1, medians of {settings['rounds']} rounds\n"
        )
        header = ["", "tokens/s", "first token, ms", "peak MB", "weights MB"]
        table = [
            [
                title,
                f"{figures['tokens_per_second']:.1f}",
                f"{1e3 * figures['first_token_seconds']:.0f}",
                f"{figures['peak_bytes'] / MB:.0f}",
                f"{figures['weight_bytes'] / MB:.0f}",
            ]
            for title, figures in found.items()
        ]
        print(markdown_table(header, table))
        print()
        large = settings["model"] == ONE_BILLION
        _print_ratio(found, "4 bits over bfloat16", FOUR, BFLOAT16, 3.0 if large else 1.6)
        if large:
            _print_ratio(found, "4 bits over llama.cpp", FOUR, LLAMA_CPP, 0.8)
        _print_ratio(found, "2 bits over 4 bits", TWO, FOUR, 1.0)
        _print_ratio(found, "saved, loaded in a fresh process, over never saved", SAVED, NEVER_SAVED, 0.95)
        if FOUR.title in found:
            four = found[FOUR.title]
            cache = settings["cache_bytes"]
            ratio = four["peak_bytes"] / (four["weight_bytes"] + cache)
            print(verdict("4 bits: peak memory over weights and cache", ratio, 1.25))
        print(f"\n{describe(row['environment'])}")


def _print_ratio(found: dict[str, Any], claim: str, one: Contender, other: Contender, limit: float) -> None:
    if one.title in found and other.title in found:
        ratio = found[one.title]["tokens_per_second"] / found[other.title]["tokens_per_second"]
        print(verdict(f"tokens per second, {claim}", ratio, limit, at_least=True))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure the models that the results file lacks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.json")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help=f"of {MODELS}, or any that transformers loads"
    )
    parser.add_argument("--rows", nargs="+", help="titles of contenders; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument(
        "--work_dir", type=Path, help="where checkpoints are kept (6 GB); a temporary folder by default"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: checks that the script runs")
    args = parser.parse_args(argv)
    if args.serve:
        serve(Contender(*json.loads(args.serve)), args.work_dir, args.prompt_tokens, args.new_tokens)
        return
    if args.smoke:
        args.models, args.rounds, args.prompt_tokens, args.new_tokens = [SMOKE], 1, 8, 4
        args.rows = args.rows or [contender.title for contender in (BFLOAT16, FOUR, TWO, NEVER_SAVED, SAVED)]
    if not args.table:
        with tempfile.TemporaryDirectory() as temporary:
            for model in args.models:
                _measure_model(args, model, Path(args.work_dir or temporary) / model.replace("/", "--"))
    print_tables(args.output)


def _measure_model(args: argparse.Namespace, model: str, folder: Path) -> None:
    results = Results(args.output, seed=0)
    settings = {
        "model": model,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "rows": [contender.title for contender in chosen(args)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    log(f"{model}: writing checkpoints to {folder}")
    prepare(model, folder)
    settings["cache_bytes"] = _cache_bytes(folder, args.prompt_tokens + args.new_tokens)
    if results.find(settings) is None:
        results.add(settings, measure(args, model, folder))


def _cache_bytes(folder: Path, tokens: int) -> int:
    config = LlamaConfig.from_pretrained(folder / "float")
    head = config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens  # keys and values, bfloat16


if __name__ == "__main__":
    main()
