# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Generation on a CPU: tokens per second, time to the first token and peak memory of packed models and of their peers.

Every contender is a process of its own that loads its checkpoint, and is then asked in turn: a round is one measurement of
each, and figures are medians of rounds. llama.cpp runs our GGUF export of the very same packed model.

    python -m benchmarks decode

A model's contenders are stored together when its last round is done. Linux only.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.core.worker import command, variables
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import float_model
from peft_ext import PeqaConfig
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.models import DEFAULT_MODEL, load_tokenizer
from peft_ext.quant.kernel import KERNEL_VARIABLE
from peft_ext.text import PYTHON_DOCS, load_text


ONE_BILLION = "random Llama, 1.07 billion"
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


def prepare(model: str, folder: Path, contenders: list[Contender]) -> None:
    """Write the checkpoints of a model that contenders load: floats in bfloat16, packed ones, and a GGUF."""
    wanted = {"float", *(contender.checkpoint for contender in contenders)}
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    for name, bits in _CHECKPOINTS.items():
        if name not in wanted:
            continue
        torch.manual_seed(0)
        loaded = _build(model) if bits is None else AutoModelForCausalLM.from_pretrained(folder / "float")
        if bits is not None:
            loaded = get_peft_model(loaded, PeqaConfig(bits=bits)).merge_and_unload()
            if name != SAVED_CHECKPOINT:
                make_saveable(loaded, "bcq")
        partial = folder / f"{name}.partial"
        loaded.save_pretrained(partial)
        if LLAMA_CPP in contenders and name == LLAMA_CPP.checkpoint:
            export_gguf(loaded, tokenizer, partial / "model.gguf")
        partial.rename(folder / name)


def _build(model: str) -> PreTrainedModel:
    if model != ONE_BILLION:
        return float_model(model).bfloat16()
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


def serve(contender: list, folder: str, prompt_tokens: int, new_tokens: int) -> None:
    """A contender's process: load, then a JSON line of figures for each line read.

    Args:
        contender: The fields of a [`Contender`].
        folder: Of its checkpoint.
        prompt_tokens: Of the prompt.
        new_tokens: Generated behind it.
    """
    _serve(Contender(*contender), Path(folder), prompt_tokens, new_tokens)


def _serve(contender: Contender, folder: Path, prompt_length: int, new_tokens: int) -> None:
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


def measure_all(run: Run, contenders: list[Contender], folder: Path) -> dict[str, dict[str, Any]]:
    """All contenders in turn: medians, and all values, by title."""
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for contender in contenders:
            log(f"{run.model}: loading {contender.title}")
            processes[contender.title] = process = _start(run, contender, folder / contender.checkpoint)
            _answer(process, contender)  # one after the other, so that loading and compiling don't compete
        rounds: dict[str, list[dict[str, float]]] = {title: [] for title in processes}
        for number in range(run.rounds):
            log(f"{run.model}: round {number + 1} of {run.rounds}")
            for contender in contenders:
                process = processes[contender.title]
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                rounds[contender.title].append(json.loads(_answer(process, contender)))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    sizes = {name: _weight_bytes(folder / name) for name in _CHECKPOINTS if (folder / name).is_dir()}
    return {
        contender.title: {
            **{
                key: statistics.median(row[key] for row in rounds[contender.title])
                for key in rounds[contender.title][0]
            },
            "weight_bytes": _gguf_bytes(folder) if contender.llama_cpp else sizes[contender.checkpoint],
            "rounds": rounds[contender.title],
        }
        for contender in contenders
    }


def _start(run: Run, contender: Contender, folder: Path) -> subprocess.Popen[str]:
    arguments = {"contender": contender, "folder": str(folder)}
    arguments |= {name: run.settings[name] for name in ("prompt_tokens", "new_tokens")}
    # freed memory is handed back at once, so that peaks are of tensors; the CPU kernel in its default mode
    held = variables({"MALLOC_MMAP_THRESHOLD_": "1048576", KERNEL_VARIABLE: "auto"})
    return subprocess.Popen(
        command(serve, arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=held
    )


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


def chosen(run: Run) -> list[Contender]:
    """The contenders of an experiment."""
    wanted = [contender for contender in CONTENDERS if contender.title in run.contenders]
    if LLAMA_CPP in wanted:
        try:
            import llama_cpp  # noqa: F401
        except ImportError:
            log("llama.cpp is left out: pip install 'peft-ext[bench]' (llama-cpp-python)")
            wanted.remove(LLAMA_CPP)
    return wanted


def measure(run: Run) -> None:
    """All contenders of the model, stored together."""
    if run.rows:
        return
    contenders = chosen(run)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log(f"{run.model}: writing checkpoints to {folder}")
        prepare(run.model, folder, contenders)
        key = {"cache_bytes": _cache_bytes(folder, run.prompt_tokens + run.new_tokens)}
        run.add(key, measure_all(run, contenders, folder))


def tables(run: Run) -> dict[str, str]:
    """Speed and memory by contender."""
    if not run.rows:
        return {}
    header = ["", "tokens/s", "first token, ms", "peak MB", "weights MB"]
    lines = [
        [
            title,
            f"{figures['tokens_per_second']:.1f}",
            f"{1e3 * figures['first_token_seconds']:.0f}",
            f"{figures['peak_bytes'] / MB:.0f}",
            f"{figures['weight_bytes'] / MB:.0f}",
        ]
        for title, figures in run.rows[-1]["result"].items()
    ]
    return {"Generation": markdown_table(header, lines)}


def speed(run: Run, contender: Contender) -> Optional[float]:
    """Tokens a second."""
    return run.rows[-1]["result"].get(contender.title, {}).get("tokens_per_second") if run.rows else None


def claims(run: Run) -> list[Claim]:
    """Packed models are faster than bfloat16, in the memory of their weights."""
    large, titles = run.model == ONE_BILLION, run.contenders
    pairs = {
        "4 bits over bfloat16": (FOUR, BFLOAT16, 3.0 if large else 1.6),
        "4 bits over llama.cpp": (FOUR, LLAMA_CPP, 0.8),
        "2 bits over 4 bits": (TWO, FOUR, 1.0),
        "saved, loaded in a fresh process, over never saved": (SAVED, NEVER_SAVED, 0.95),
    }
    found = []
    for name, (one, other, bound) in pairs.items():
        if one.title in titles and other.title in titles and (large or other != LLAMA_CPP):
            ours, theirs = speed(run, one), speed(run, other)
            ratio = ours / theirs if ours and theirs else None
            found.append(Claim(f"tokens per second, {name}", ratio, bound, at_least=True))
    if FOUR.title in titles:
        figures = run.rows[-1]["result"].get(FOUR.title) if run.rows else None
        held = figures and figures["weight_bytes"] + run.rows[-1]["key"]["cache_bytes"]
        ratio = figures["peak_bytes"] / held if figures else None
        found.append(Claim("4 bits: peak memory over weights and cache", ratio, 1.25))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """Both models."""
    found = []
    for name, what, bound in (("smollm2", "SmolLM2", 1.6), ("billion", "1.07 billion parameters", 3.0)):
        run = run_named(runs, name)
        if run is None or not run.rows:
            continue
        ours, plain, other = speed(run, FOUR), speed(run, BFLOAT16), speed(run, LLAMA_CPP)
        assert ours and plain and other
        found.append(
            Headline(
                "Speed and serving on a CPU",
                f"Generation, {what}, 4 bits",
                f"{ours:.1f} tokens/s; bfloat16 {plain:.1f}, llama.cpp on our GGUF {other:.1f}",
                unless(ours / plain >= bound, f"{bound:g} times bfloat16: {ours / plain:.1f}"),
                "../benchmarks/serving.md",
            )
        )
    return found


def _cache_bytes(folder: Path, tokens: int) -> int:
    config = LlamaConfig.from_pretrained(folder / "float")
    head = config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens  # keys and values, bfloat16


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
