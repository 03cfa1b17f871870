# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A packed checkpoint, loaded in a fresh process: peak memory above the interpreter's own, time to load and to the first
token, tokens a second; against the same model that was never saved, stock transformers and the float model.

Every measurement is a process of its own, and contenders take turns; figures are medians.

    python -m benchmarks.loading --what memory   # may run beside other work
    python -m benchmarks.loading                 # time as well: on a quiet machine

Linux only. Needs 6 GB of memory and 4 GB of disk for the model of 1.1 billion.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.common import Results, argument_parser, describe, fresh_process, log, markdown_table, verdict
from benchmarks.peqa_training import BILLION_CONFIG
from benchmarks.tuning import tiny_llama
from peft_ext import PeqaConfig
from peft_ext.checkpoint.saving import make_saveable


BILLION, SMOKE = "random Llama, 1.1 billion", "tiny random Llama"
KINDS = ("memory", "time")
MB = 1e6


class Contender(NamedTuple):
    """Who loads what."""

    title: str
    checkpoint: str  # a folder of `prepare`
    flags: tuple[str, ...] = ()


FLOAT, SAVED, BCQ = "float", "pack-quantized", "bcq"
NEVER_SAVED = Contender("packed in this process, never saved", FLOAT, ("--pack",))
OURS = Contender("saved, loaded in a fresh process", SAVED, ("--peft-ext",))
OUR_BCQ = Contender("the same, `bcq`", BCQ, ("--peft-ext",))
STOCK = Contender("the same file, stock transformers (float layers)", SAVED)
BFLOAT16 = Contender("the float model, bfloat16", FLOAT)
CONTENDERS = (NEVER_SAVED, OURS, OUR_BCQ, STOCK, BFLOAT16)


def build(model: str, seed: int) -> PreTrainedModel:
    """A model with random weights, in bfloat16."""
    if model == SMOKE:
        return tiny_llama(seed=seed).bfloat16()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**BILLION_CONFIG), dtype=torch.bfloat16)


def prepare(model: str, folder: Path, seed: int) -> None:
    """Write the float checkpoint and both packed ones (4 bits, a scale and a zero point for each channel), once."""
    for name in (FLOAT, SAVED, BCQ):
        if (folder / name).is_dir():
            continue
        log(f"{model}: writing {name}")
        if name == FLOAT:
            loaded = build(model, seed)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder / FLOAT)
            loaded = get_peft_model(loaded, PeqaConfig(bits=4)).merge_and_unload()
            make_saveable(loaded, name)
        partial = folder / f"{name}.partial"
        loaded.save_pretrained(partial)
        del loaded
        partial.rename(folder / name)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """All contenders, `repeats` times in turn: medians, and all values, by title."""
    # what the float model takes while it is packed is no question of loading
    contenders = [each for each in CONTENDERS if args.what == "time" or each != NEVER_SAVED]
    repeats: dict[str, list[dict[str, Any]]] = {contender.title: [] for contender in contenders}
    for number in range(args.repeats):
        for contender in contenders:
            log(f"Round {number + 1} of {args.repeats}: {contender.title}")
            flags = [str(folder / contender.checkpoint), *contender.flags]
            flags += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
            repeats[contender.title].append(fresh_process("benchmarks.loading_worker", flags, contender.title))
    found: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        rows = repeats[contender.title]
        numbers = [key for key, value in rows[0].items() if isinstance(value, (int, float))]
        found[contender.title] = {
            **{key: statistics.median(row[key] for row in rows) for key in numbers},
            "layers": rows[0]["layers"],
            "file_bytes": sum(path.stat().st_size for path in (folder / contender.checkpoint).glob("*.safetensors")),
            "repeats": rows,
        }
    return found


def print_table(row: dict[str, Any]) -> None:
    """The table of one result, and what was to be reached."""
    settings, found = row["settings"], row["result"]
    timed = settings["what"] == "time"
    print(f"\n{settings['model']}, 4 bits per channel, medians of {settings['repeats']} processes\n")
    header = ["", "file, MB", "peak of loading, MB", "over its file", "peak after generating, MB"]
    if timed:
        header += ["seconds to load", "first token, first call, ms", "first token, later, ms", "tokens/s"]
    table = []
    for title, figures in found.items():
        cells = [
            title,
            f"{figures['file_bytes'] / MB:,.0f}",
            f"{figures['load_peak_bytes'] / MB:,.0f}",
            f"{figures['load_peak_bytes'] / figures['file_bytes']:.2f}",
            f"{figures['peak_bytes'] / MB:,.0f}",
        ]
        if timed:
            cells += [
                f"{figures['load_seconds']:.1f}",
                f"{1e3 * figures['first_call_seconds']:,.0f}",
                f"{1e3 * figures['first_token_seconds']:,.0f}",
                f"{figures['tokens_per_second']:.1f}",
            ]
        table.append(cells)
    print(markdown_table(header, table))
    print()
    ours = found[OURS.title]
    for kind, claim in (("load_peak_bytes", "peak of loading"), ("peak_bytes", "peak, generation included")):
        print(verdict(f"{claim}, over the packed bytes", ours[kind] / ours["file_bytes"], 1.15))
    if timed:
        never = found[NEVER_SAVED.title]
        for kind, claim in (("first_call_seconds", "first call"), ("first_token_seconds", "later calls")):
            print(verdict(f"first token, {claim}, over the never-saved model's", ours[kind] / never[kind], 1.1))
        ratio = ours["tokens_per_second"] / never["tokens_per_second"]
        print(verdict("tokens per second, over the never-saved model's", ratio, 0.95, at_least=True))
    print(f"\n{describe(row['environment'])}")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what the results file lacks, and print the tables."""
    budget = {"repeats": 5, "prompt_tokens": 64, "new_tokens": 32}
    parser = argument_parser(__doc__, "loading.json", budget=budget)
    parser.add_argument(
        "--what", choices=KINDS, default="time", help="time includes memory, and wants a quiet machine"
    )
    parser.add_argument("--work-dir", type=Path, help="where checkpoints are kept; a temporary folder by default")
    args = parser.parse_args(argv)
    model = SMOKE if args.smoke else BILLION
    if args.smoke:
        args.repeats, args.prompt_tokens, args.new_tokens = 1, 8, 4
    results = Results(args.output, args.seed)
    settings = {
        "model": model,
        "what": args.what,
        "repeats": args.repeats,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": torch.get_num_threads(),
    }
    if not args.table and results.find(settings) is None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.work_dir or temporary) / model.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            prepare(model, folder, args.seed)
            results.add(settings, measure(args, folder))
    for row in results.rows:
        print_table(row)


if __name__ == "__main__":
    main()
