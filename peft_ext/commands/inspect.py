# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext inspect`: what is in a checkpoint, an adapter or a run, without loading it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import peft_ext  # noqa: F401 (registers the tuners that adapters name)
from peft_ext.checkpoint.contents import Contents, LayerContents, read_contents
from peft_ext.command_line import parse, show
from peft_ext.tables import mebibytes, pairs


@dataclass
class InspectArguments:
    """What to look into."""

    path: Optional[str] = field(
        default=None,
        metadata={"help": "Folder of a checkpoint, an adapter or a run, or a .gguf file (or the first argument)."},
    )
    layers: bool = field(default=False, metadata={"help": "List every layer, not only how many of a kind there are."})


def main(argv: Sequence[str]) -> None:
    """Read and print."""
    (args,) = parse(argv, InspectArguments, positional="path")
    if not args.path:
        raise ValueError("path is missing: pass the folder of a checkpoint, an adapter or a run, or a .gguf file.")
    path = Path(args.path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"path={args.path!r} doesn't exist.")
    found = [read_contents(part) for part in _parts(path)]
    # --json: a list, of a run base and adapter
    text = "\n\n".join(_described(contents, args.layers) for contents in found)
    show([asdict(contents) for contents in found], text)


def _parts(path: Path) -> list[Path]:
    """Of a run, base and adapter, as far as they are written."""
    run = (path / "config.yaml").is_file() and not (path / "config.json").is_file()
    parts = [path / name for name in ("base", "adapter") if (path / name).is_dir()] if run else []
    return parts or [path]


def _described(contents: Contents, every_layer: bool) -> str:
    rows = [
        ("format", contents.format + (f" ({contents.format_version})" if contents.format_version else "")),
        ("architecture", contents.architecture),
        ("base model", contents.base_model),
        ("size", mebibytes(contents.nbytes)),
    ]
    if contents.kind == "adapter" and contents.layers:  # LoRA and others have no scales
        rows.append(("trained scales", f"{sum(math.prod(layer.shape) for layer in contents.layers):,}"))
        rows.append(("fingerprint", _joint_fingerprint(contents.layers)))
    lines = [f"{contents.path}: {contents.kind}", pairs([(name, value) for name, value in rows if value])]
    if every_layer:
        lines += [f"  {layer.name}: {_one(layer)}, {mebibytes(layer.nbytes)}" for layer in contents.layers]
        return "\n".join(lines)
    kinds: dict[str, list[LayerContents]] = {}
    for layer in contents.layers:
        kinds.setdefault(_kind(layer), []).append(layer)
    lines += [f"  {len(layers)} layers of {kind}{_density(contents, layers)}" for kind, layers in kinds.items()]
    return "\n".join(lines)


def _kind(layer: LayerContents) -> str:
    groups = "per channel" if layer.group_size == -1 else f"groups of {layer.group_size}"
    return f"{layer.number_format}{'' if layer.bits is None else f', {layer.bits} bits'}, {groups}"


def _one(layer: LayerContents) -> str:
    code = "" if layer.fingerprint is None else f", codes {layer.fingerprint:016x}"
    return f"{_kind(layer)}, {' x '.join(map(str, layer.shape))}{code}"


def _density(contents: Contents, layers: list[LayerContents]) -> str:
    nbytes = sum(layer.nbytes for layer in layers)
    if contents.kind == "adapter":
        return f": {mebibytes(nbytes)}"
    weights = sum(math.prod(layer.shape) for layer in layers)
    return f": {mebibytes(nbytes)}, {8 * nbytes / weights:.2f} bits per weight with scales"


def _joint_fingerprint(layers: list[LayerContents]) -> Optional[str]:
    """One number for all layers' codes: adapters that have the same go onto the same base."""
    if not layers:
        return None
    listed = sorted((layer.name, layer.fingerprint) for layer in layers)
    return hashlib.blake2b(repr(listed).encode(), digest_size=8).hexdigest()
