# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext push`: upload what the commands wrote, so that strangers can load it; no model is loaded.

Of a run of `peft-ext tune`, base and adapter go into a repository each, and the adapter names its base by the
repository's id. Model cards get the id that the snippets are to load, and lose nothing of what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import CommitOperationAdd, HfApi

from peft_ext.command_line import parse, show
from peft_ext.files import read_json
from peft_ext.hub import is_hub_id
from peft_ext.model_card import README, pushed_card
from peft_ext.models import DEFAULT_MODEL


ADAPTER_CONFIG, _RUN_CONFIG = "adapter_config.json", "config.yaml"
# What tells that a folder is a whole model, adapter, classifier or pipeline.
_WHOLE = (ADAPTER_CONFIG, "config.json", "palp.json", "ood_pipeline.json")
# Of a run that isn't `tune`'s: the folder in it that is worth sharing.
_INSIDE_RUNS = ("critic", "model")


@dataclass
class PushArguments:
    """What goes where. The hub's token is taken from HF_TOKEN or `hf auth login`."""

    folder: Optional[str] = field(
        default=None,
        metadata={
            "help": "A run, or the folder of an adapter, a packed model, a critic, a PALP classifier or an OOD pipeline (or "
            "the first argument)."
        },
    )
    repo_id: Optional[str] = field(default=None, metadata={"help": "Where to, owner/name; made if need be."})
    base_repo_id: Optional[str] = field(
        default=None,
        metadata={"help": "Of an adapter: where its base is; of a run, its base is pushed there (<repo_id>-base)."},
    )
    private: Optional[bool] = field(default=None, metadata={"help": "Make new repositories private."})
    create_pr: bool = field(default=False, metadata={"help": "Open pull requests instead of committing."})
    commit_message: Optional[str] = field(default=None, metadata={"help": "What the commits are called."})


def main(argv: Sequence[str]) -> None:
    """Check everything, then upload."""
    (args,) = parse(argv, PushArguments, positional="folder")
    for name in ("folder", "repo_id"):
        if not getattr(args, name):
            raise ValueError(f"{name} is missing: pass --{name}.")
    for name in ("repo_id", "base_repo_id"):
        if getattr(args, name) and not is_hub_id(getattr(args, name)):
            raise ValueError(f"{name}={getattr(args, name)!r} is no id of the hub; pass owner/name.")
    folders = _parts(args)
    for folder, repo_id in folders.items():
        _check(folder, repo_id, args)
    urls = [_push(folder, repo_id, args) for folder, repo_id in folders.items()]
    show(dict(zip(folders.values(), urls)), "\n".join(urls))


def _parts(args: PushArguments) -> dict[Path, str]:
    """Folders, and where they go; a base before its adapter."""
    folder = Path(args.folder or "").expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={args.folder!r}: there is no such folder.")
    if any((folder / name).is_file() for name in _WHOLE):
        return {folder: args.repo_id or ""}
    if (folder / _RUN_CONFIG).is_file():
        if not (folder / "metrics.json").is_file():
            raise FileNotFoundError(f"folder={args.folder!r} is no finished run: it has no metrics.json.")
        if (folder / "adapter" / ADAPTER_CONFIG).is_file():
            args.base_repo_id = args.base_repo_id or f"{args.repo_id}-base"
            return {folder / "base": args.base_repo_id, folder / "adapter": args.repo_id or ""}
        for name in _INSIDE_RUNS:
            if (folder / name / "config.json").is_file():
                return {folder / name: args.repo_id or ""}
    raise ValueError(
        f"folder={args.folder!r} holds nothing to push: it has none of {', '.join(_WHOLE)}, and is no run."
    )


def _check(folder: Path, repo_id: str, args: PushArguments) -> None:
    """Refuse an adapter whose base nobody else finds.

    Raises:
        ValueError: Names the base and the way out.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or args.base_repo_id:
        return
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base is None or (base != DEFAULT_MODEL and Path(base).expanduser().exists()):
        raise ValueError(
            f"the adapter's base is {base!r}, which nobody else finds: push it first (peft-ext push {base} --repo_id "
            f"{repo_id}-base), then pass --base_repo_id {repo_id}-base."
        )


def _push(folder: Path, repo_id: str, args: PushArguments) -> str:
    """Upload one folder; returns where it is."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=args.private, exist_ok=True).repo_id
    config: dict[str, Any] = {}
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_json(folder / ADAPTER_CONFIG)
    base = args.base_repo_id if config else None
    contents: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if (folder / README).is_file():
        contents[README] = pushed_card(folder / README, repo_id, base, config.get("base_model_name_or_path")).encode()
    if base is not None:
        config["base_model_name_or_path"] = base
        contents[ADAPTER_CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    done = api.create_commit(
        repo_id=repo_id,
        operations=[CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in contents.items()],
        commit_message=args.commit_message or "Upload with peft-ext",
        create_pr=args.create_pr,
    )
    return str(done.pr_url) if args.create_pr else f"{api.endpoint}/{repo_id}"
