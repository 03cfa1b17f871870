# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ALMoST from end to end: from a language model and a handful of demonstrations to an aligned one. One command, which can be
killed at any moment and goes on.

```bash
peft-ext almost --config trl_ext/recipes/smollm2-135m.yaml --run_dir runs/almost --dry_run
peft-ext almost --config trl_ext/recipes/smollm2-135m.yaml --run_dir runs/almost --set queries.count=200
```
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from peft_ext import command_line
from peft_ext.command_line import parse, run_main
from trl_ext.almost.pipeline import Pipeline
from trl_ext.almost.plan import plan, show
from trl_ext.almost.recipe import AlmostConfig, override


@dataclass
class PipelineArguments(AlmostConfig):
    """A recipe, and what to do with it."""

    run_dir: Optional[str] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The folder of the run; an interrupted run there goes on. Needed."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Show the plan, with counts and tokens, and run nothing."})
    set: list[str] = field(
        default_factory=list, metadata={"help": "Settings in place of the recipe's, such as queries.count=100."}
    )

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ValueError("run_dir is missing: pass --run_dir, the folder of the run.")
        super().__post_init__()


def main(argv: Sequence[str]) -> None:
    """Parse the flags and the recipe (`--config`), and run what isn't done."""
    (args,) = parse(argv, PipelineArguments, aliases={"output_dir": "run_dir", "model": "model_name_or_path"})
    values = {name: value for name, value in vars(args).items() if name not in ("dry_run", "set")}
    pipeline = Pipeline(override(AlmostConfig(**values), args.set))
    if args.dry_run:
        planned = plan(pipeline)
        command_line.show(planned, show(planned))
        return
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("trl_ext").setLevel(logging.INFO)
    done = pipeline.run()
    lines = (
        f"{stage}: " + (", ".join(f"{name} {count}" for name, count in counts.items()) or "done")
        for stage, counts in done.items()
    )
    command_line.show(done, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost"))
