# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext export`: a tuned model, its adapter merged, in the format that another engine reads; or the adapter as (IA)^3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_ext.checkpoint.fused_layers import fused_notice, pack_the_rest
from peft_ext.checkpoint.mixed_precision import kept_as_floats, stock_loads
from peft_ext.checkpoint.pack_quantized import vllm_notice
from peft_ext.checkpoint.saving import make_saveable, take_over
from peft_ext.command_line import note, parse, show
from peft_ext.commands.run_folder import new_folder
from peft_ext.files import written_whole
from peft_ext.models import copy_processor, load, load_tokenizer, locate
from peft_ext.quant.conversion import dequantize_layers, packed_layers
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.ia3 import how_packed, save_ia3
from peft_ext.tables import mebibytes


# What `--to` names, and the checkpoint format of ours that it means.
TARGETS = {"compressed-tensors": "pack-quantized", "bcq": "bcq", "dequantized": None, "gguf": None}
# What stock PEFT loads beside the base; nothing is merged.
IA3 = "ia3"
# Those that a model without packed layers can be written to, too.
FLOAT_TARGETS = ("dequantized", "gguf")
GGUF_FILE = "model.gguf"


@dataclass
class ExportArguments:
    """What to export, in which format."""

    model: Optional[str] = field(
        default=None,
        metadata={
            "help": "Run folder of `peft-ext tune`, packed checkpoint, adapter, hub id, float model or GGUF (or the first "
            "argument)."
        },
    )
    adapter: Optional[str] = field(
        default=None, metadata={"help": "Adapter folder to merge into a packed checkpoint."}
    )
    to: Optional[str] = field(
        default=None,
        metadata={
            "help": "compressed-tensors (integers, for stock transformers and vLLM), gguf (for llama.cpp), bcq (for "
            "transformers with peft_ext) or dequantized (plain floats); or ia3 (the adapter of one scale per channel alone, for "
            "PEFT without peft_ext)."
        },
    )
    output_dir: Optional[str] = field(default=None, metadata={"help": "The new folder to write to."})
    container_bits: Optional[int] = field(
        default=None,
        metadata={
            "help": "Of compressed-tensors: store narrower codes in fields of this width; 4 for 2 and 3 bits in vLLM."
        },
    )
    pack_rest: bool = field(
        default=False,
        metadata={
            "help": "Of compressed-tensors: also pack float layers that vLLM runs as one with packed ones (of q, k, v; of "
            "gate, up), each weight to the nearest level."
        },
    )
    other_tensors: str = field(
        default="f16", metadata={"help": "Of gguf: what isn't packed, such as embeddings, as f16 or q8_0."}
    )
    low_bit_types: bool = field(
        default=False,
        metadata={
            "help": "Of gguf: store 2 symmetric bits as Q2_0 and 1 bit as Q1_0, half the size of Q4_0, which llama.cpp reads "
            "since July 2026, on x86 at a tenth of the speed."
        },
    )


def main(argv: Sequence[str]) -> None:
    """Check everything, then merge, write and say what was written."""
    (args,) = parse(argv, ExportArguments, positional="model")
    _check(args)
    folder = new_folder(args.output_dir)
    if args.to == IA3:
        _export_ia3(args, folder)
        return
    tokenizer = load_tokenizer(args.model)
    model = merged(_load(args), str(args.model), floats=args.to in FLOAT_TARGETS)
    if args.pack_rest:
        rest = pack_the_rest(model)
        names = f" ({', '.join(rest[:3])}{', ...' if len(rest) > 3 else ''})" if rest else ""
        note(f"packed like the layers that vLLM runs them with: {len(rest)}{names}")
    if args.to in FLOAT_TARGETS:
        kept_as_floats(model)
    if args.to in ("compressed-tensors", "bcq"):
        make_saveable(model, TARGETS[args.to], args.container_bits)
    elif args.to == "dequantized":
        make_saveable(dequantize_layers(model))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as partial:
        _write(model, tokenizer, partial, args)
    size = sum(path.stat().st_size for path in folder.iterdir())
    show({"to": args.to, "bytes": size, "output_dir": str(folder)}, f"{args.to}: {mebibytes(size)} in {folder}")
    if args.to == "compressed-tensors":
        stored = model.config.quantization_config
        one_scheme = len(stored.quantization_config.config_groups) == 1
        for notice in filter(None, (vllm_notice(stored), fused_notice(model, one_scheme))):
            note(f"Note: {'stock transformers loads it; ' if stock_loads(model) else ''}{notice}")


def _export_ia3(args: ExportArguments, folder: Path) -> None:
    """Write the adapter and say what it goes onto."""
    model = load(args.model, adapter=args.adapter)
    if not isinstance(model, PeftModel):
        raise ValueError(f"model={args.model!r} has no adapter, which --to ia3 is for; name a run or an adapter.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_ia3(model, folder, model.active_adapter)
    size = sum(path.stat().st_size for path in folder.iterdir())
    show({"to": args.to, "bytes": size, "output_dir": str(folder)}, f"{args.to}: {mebibytes(size)} in {folder}")
    base = model.peft_config[model.active_adapter].base_model_name_or_path
    if how_packed(base) == "compressed-tensors":
        note(
            f"Note: it goes onto {base!r}, which stock transformers loads: PeftModel.from_pretrained(base, {str(folder)!r})."
        )
    else:
        note(
            f"Note: stock transformers doesn't load its base {base!r}. peft-ext export --model {base} --to dequantized makes one "
            "that it loads; the adapter goes onto that."
        )


def merged(model: PreTrainedModel, name: str, floats: bool = False) -> PreTrainedModel:
    """The model with packed layers, the adapter merged into them.

    Args:
        model: With or without an adapter.
        name: What the user called it.
        floats: Whether a model of floats will do, too.

    Raises:
        ValueError: If it has no packed layers, or the adapter can't be merged into them.
    """
    if isinstance(model, PeftModel):
        if not _changes_scales(model) and packed_layers(model):
            kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
            raise ValueError(
                f"model={name!r} is {kind} on a packed base, whose codes are never rounded again, so it can't be merged "
                "into them: pass --to dequantized or gguf, or let the engine load base and adapter side by side."
            )
        model = model.merge_and_unload()
    else:
        take_over(model)
    if not floats and not packed_layers(model):
        raise ValueError(
            f"model={name!r} has no packed layers to export; quantise it first: peft-ext quantize --model {name}, or tune it."
        )
    return model


def _load(args: ExportArguments) -> PreTrainedModel:
    """The model; under an adapter that can only be merged into floats, its base as floats, where they are asked for."""
    model = load(args.model, adapter=args.adapter)
    if args.to not in FLOAT_TARGETS or not isinstance(model, PeftModel) or _changes_scales(model):
        return model
    base, adapter = locate(str(args.model), args.adapter)
    assert adapter is not None
    if not packed_layers(model):
        return model
    return PeftModel.from_pretrained(dequantize_layers(load(base, merge=True)), adapter).eval()


def _changes_scales(model: PeftModel) -> bool:
    """Whether the adapter is one of ours that becomes part of the packed layers."""
    return isinstance(model.active_peft_config, ScaleTuningConfig)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, args: ExportArguments) -> None:
    if args.to == "gguf":
        from peft_ext.checkpoint.gguf import block_types, export_gguf

        folder.mkdir()
        export_gguf(  # tokenizer inside
            model,
            tokenizer,
            folder / GGUF_FILE,
            other_tensors=args.other_tensors,
            low_bit_types=args.low_bit_types,
        )
        note(_stored_as(model, block_types(model, args.low_bit_types), args.other_tensors))
        return
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_processor(args.model, folder)


def _stored_as(model: PreTrainedModel, types: dict[str, Optional[str]], other_tensors: str) -> str:
    """Which types hold the packed layers, and how many bits of the file a weight takes."""
    from peft_ext.checkpoint.gguf_types import block_sizes, type_named

    found: list[str] = []
    widths: Any = Counter((model.get_submodule(name).bits, type_) for name, type_ in types.items())
    for (bits, type_), count in widths.items():
        kind = type_ or other_tensors.upper()
        weights, nbytes = block_sizes(type_named(kind))
        found.append(f"{count} layers of {bits} bits as {kind} ({8 * nbytes / weights:g} bits a weight)")
    return "in the GGUF: " + (", ".join(found) or f"no packed layers, matrices as {other_tensors.upper()}")


def _check(args: ExportArguments) -> None:
    if not args.model:
        raise ValueError("model is missing: pass a run folder, a packed checkpoint or an adapter's folder.")
    if args.to not in (*TARGETS, IA3):
        raise ValueError(f"to={args.to!r} is unknown; choose one of {(*TARGETS, IA3)}.")
    if args.container_bits is not None and args.to != "compressed-tensors":
        raise ValueError(f"container_bits={args.container_bits} is for --to compressed-tensors; leave it out.")
    if args.pack_rest and args.to != "compressed-tensors":
        raise ValueError("pack_rest=True is for --to compressed-tensors; leave it out.")
    if args.other_tensors != "f16" and args.to != "gguf":
        raise ValueError(f"other_tensors={args.other_tensors!r} is for --to gguf; leave it out.")
    if args.low_bit_types and args.to != "gguf":
        raise ValueError("low_bit_types=True is for --to gguf; leave it out.")
