# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Folders of ours that lie on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Union

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name` and nothing here is called so."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def fetched(name_or_path: Union[str, os.PathLike], **kwargs: Any) -> Path:
    """The folder that a path or a hub id names; a repository is downloaded.

    Args:
        name_or_path: A folder, or `owner/name`. What is neither comes back as a path, for the caller to miss.
        **kwargs: Of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        FileNotFoundError: If there is no such repository, or the hub can't be reached and nothing is cached.
    """
    name = os.fspath(name_or_path)
    if not is_hub_id(name):
        return Path(name).expanduser()
    try:
        return Path(snapshot_download(name, **kwargs))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name!r} is no folder here, and can't be had from the hub: {error}") from error
