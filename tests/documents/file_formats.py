# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tables of docs/file_formats.md, from the descriptions that reading and writing share.

`python -m tests.documents.file_formats` writes them into the page.
"""

from __future__ import annotations

import re

from generation_ext.critic import model_config, rollout_files
from generation_ext.in_context import pools
from generation_ext.probing import saving
from generation_ext.probing.heads import HEADS
from peft_ext import runs
from peft_ext.adapter_files import CONFIGS, LAYERS
from peft_ext.checkpoint.bcq import LAYER
from peft_ext.checkpoint.files import INDEX
from peft_ext.file_formats import field_table, tensor_table
from peft_ext.ood import detectors, pipeline
from tests.conftest import ROOT
from trl_ext.almost.data import row_formats


PAGE = ROOT / "docs" / "file_formats.md"
_DETECTORS = {
    kind.name: kind
    for kind in vars(detectors).values()
    if isinstance(kind, type) and issubclass(kind, detectors.Detector) and kind is not detectors.Detector
}


def tables() -> dict[str, str]:
    """By its name on the page, a table in Markdown."""
    layers = {name: {f"<layer>.{part}": each for part, each in parts.items()} for name, parts in LAYERS.items()}
    heads = {name: head.tensors(["weight.0", "weight.1"]) for name, head in HEADS.items()}
    return {
        **{f"adapter_config.json of {name}": each.table() for name, each in CONFIGS.items()},
        **{f"tensors of {name}": tensor_table(each) for name, each in layers.items()},
        "tensors of bcq": tensor_table({f"<layer>.{part}": each for part, each in LAYER.items()}),
        "index": INDEX.table(),
        "critic": field_table(model_config.FIELDS),
        "palp.json": saving.FILE.table(),
        "params of palp.json": field_table(saving.PARAMS),
        "palp": tensor_table(saving.STANDARDISATION),
        **{
            f"palp {name}": tensor_table({f"head.{part}": each for part, each in heads[name].items()})
            for name in heads
        },
        "ood_pipeline.json": pipeline.FILE.table(),
        "detector.json": detectors.KNN.file_format().table(),
        **{f"params of {name}": field_table(each.params) for name, each in _DETECTORS.items() if each.params},
        **{f"detector {name}": tensor_table(each.tensors) for name, each in _DETECTORS.items() if each.tensors},
        "pools": field_table(pools.POOL),
        "roll-outs": field_table(rollout_files.FIELDS),
        "manifest": runs.MANIFEST.table(),
        "queries": field_table(row_formats.QUERY),
        "responses": field_table(row_formats.response(5)),
        "demonstrations": field_table(row_formats.DEMONSTRATION),
    }


def filled(page: str) -> str:
    """The page with its tables as they are to be; a table stands after `<!-- table: <name> -->`, up to an empty line."""
    known = tables()
    return re.sub(
        r"<!-- table: (.+?) -->\n(?:\|.*\n)*", lambda found: f"{found[0].splitlines()[0]}\n{known[found[1]]}\n", page
    )


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
