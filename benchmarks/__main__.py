# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m benchmarks <task> [<experiment> ...]`: the table of tasks; everything else is `benchmarks.core.runner`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from benchmarks.core import runner
from benchmarks.core.runner import Entry
from peft_ext.command_line import run_main


# Name -> what it is about, and its module. The order of `all`.
TASKS = {
    "float_base": Entry(
        "A base of true floats, off the lattice that the default model's file has", "benchmarks.float_base"
    ),
    "peqa_quality": Entry(
        "Perplexity after tuning scales, against LoRA, QLoRA and rounding", "benchmarks.peqa_quality"
    ),
    "peqa_training": Entry("Time and memory of a training step, against LoRA's", "benchmarks.peqa_training"),
    "peqa_learning_rate": Entry("One learning rate for scales in every model", "benchmarks.peqa_learning_rate"),
    "distillation": Entry("Scales trained towards the float model, and what they forget", "benchmarks.distillation"),
    "zero_shot": Entry("Zero-shot accuracy at 4, 3 and 2 bits, by lm-evaluation-harness", "benchmarks.zero_shot"),
    "starts": Entry("Starts from data, before and after tuning, and what they take", "benchmarks.starts"),
    "embeddings": Entry("What packing the embedding and the output head saves and costs", "benchmarks.embeddings"),
    "rounding_peers": Entry(
        "Integers of other libraries at the same widths, before tuning", "benchmarks.rounding_peers"
    ),
    "bits_budget": Entry(
        "Layers of several widths under a budget of bytes, against one width", "benchmarks.bits_budget"
    ),
    "reconstruction": Entry("Which initialisation comes closest, before any tuning", "benchmarks.reconstruction"),
    "alphatuning_nlg": Entry("AlphaTuning's texts from data, against full fine-tuning", "benchmarks.alphatuning_nlg"),
    "alphatuning_sizes": Entry("Bytes and trained numbers under AlphaTuning", "benchmarks.alphatuning_sizes"),
    "decode": Entry("Generation on a CPU, against bfloat16 and llama.cpp", "benchmarks.decode"),
    "loading": Entry("Memory and time of loading a saved packed model", "benchmarks.loading"),
    "loading_others": Entry("Memory of loading what others packed", "benchmarks.loading_others"),
    "harness_speed": Entry(
        "lm-evaluation-harness: `--model peft_ext` against `hf`", "benchmarks.ecosystem.harness_speed"
    ),
    "kernels": Entry("The CPU kernel against dense products and torch's int4", "benchmarks.kernels"),
    "adapters": Entry("Many adapters on one base: loading, switching, mixed batches", "benchmarks.adapters"),
    "plan_memory": Entry("What `peft-ext plan` says against measured peaks", "benchmarks.plan_memory"),
    "experts": Entry("A block of packed experts against transformers' own ways", "benchmarks.experts"),
    "harness": Entry("lm-evaluation-harness's figures on packed models beside ours", "benchmarks.ecosystem.harness"),
    "serving": Entry("Servers and pipelines of others: is the text ours?", "benchmarks.ecosystem.serving"),
    "trl_scripts": Entry("`trl sft` and `trl dpo` on a packed base", "benchmarks.ecosystem.trl_scripts"),
    "vllm_reading": Entry("What vLLM's own code reads of our checkpoints", "benchmarks.ecosystem.vllm_reading"),
    "critic_cost": Entry("What a steered token costs, by way of steering", "benchmarks.critic_cost"),
    "critic_control": Entry(
        "A critic's steering of sentiment, topics and toxicity, judged independently", "benchmarks.critic_control"
    ),
    "scoring": Entry(
        "Labels scored behind shared demonstrations, against lm-evaluation-harness", "benchmarks.scoring"
    ),
    "sgicl": Entry("SG-ICL against zero-shot and gold demonstrations", "benchmarks.sgicl"),
    "palp": Entry("PALP against linear probing, in-context learning and LoRA", "benchmarks.palp"),
    "ood": Entry("Out-of-distribution detection behind all tuning methods", "benchmarks.ood"),
    "open_set": Entry(
        "A classifier that refuses: thresholds per intent, and by examples from outside", "benchmarks.open_set"
    ),
    "ood_baselines": Entry("What needs no tuning, against texts from outside", "benchmarks.ood_baselines"),
    "ood_detectors": Entry("Time and memory of the detectors", "benchmarks.ood_detectors"),
    "ga_attention": Entry("What GA-Attention costs, against SDPA with a float mask", "benchmarks.ga_attention"),
    "paraphrase": Entry("C-DNPG's paraphrases against a Transformer's of its size", "benchmarks.paraphrase"),
    "almost": Entry("ALMoST from end to end on SmolLM2, its ablations and its speed", "benchmarks.almost"),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_main(lambda rest: runner.main(rest, TASKS), argv, runner.PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
