# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tasks: how an example, a demonstration and a request for a new one are written; SST-2, SST-5, RTE and CB of SG-ICL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, Optional, Union


Example = Union[str, Mapping[str, str]]
LABEL = "label"


@dataclass(frozen=True)
class Task:
    """A classification task as text.

    Args:
        template: An example without its label; ends where the label word goes. Slots in braces are the example's
            fields, as in `"Review : {text}\\nSentiment :"`; a brace of the text itself is doubled.
        labels: The data's labels -> the words that stand for them, with the space before them.
        generation_template: Asks for a new example like a given one: has the template's fields and `{label}`, and ends
            where the text is to go on. None: the task has no self-generation.
        class_only_template: Asks for a new example of a class, without one as a model; has `{label}`, and may have
            fields that are kept. None: as `generation_template`.
        generated_field: The field that is generated; the others are taken from the given example (SG-ICL keeps the
            premise). None: the last field of the template.
        separator: Between demonstrations.
        max_new_tokens: Most tokens of a generated field.
        min_new_tokens: Fewest tokens of a generated field.
        name: For messages and files.

    Raises:
        ValueError: If a template lacks a slot or has one that nothing fills, if there are fewer than two labels, or
            two with the same word; the message names it.
    """

    template: str
    labels: Mapping[str, str]
    generation_template: Optional[str] = None
    class_only_template: Optional[str] = None
    generated_field: Optional[str] = None
    separator: str = "\n\n\n"
    max_new_tokens: int = 25
    min_new_tokens: int = 5
    name: str = "task"
    fields: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        fields = _slots(self.template, "template")
        if not fields:
            raise ValueError(
                f"template={self.template!r} has no slot for the text; write one in braces, as '{{text}}'."
            )
        if LABEL in fields:
            raise ValueError(
                f"template={self.template!r} has a slot {{label}}; it ends where the label goes, which is added to it."
            )
        object.__setattr__(self, "fields", tuple(fields))
        object.__setattr__(self, "labels", dict(self.labels))
        self._check_labels()
        if self.generated_field is None:
            object.__setattr__(self, "generated_field", fields[-1])
        elif self.generated_field not in fields:
            raise ValueError(f"generated_field={self.generated_field!r} is no slot of the template: {self.fields}.")
        for name in ("generation_template", "class_only_template"):
            self._check_generation(name)
        if not 0 < self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be positive and at most max_new_tokens="
                f"{self.max_new_tokens}."
            )

    @property
    def words(self) -> list[str]:
        """The label words, in the order of `labels`."""
        return list(self.labels.values())

    def text(self, example: Example) -> str:
        """An example, up to where its label goes.

        Args:
            example: A string for a task of one field, or a mapping that has the fields.

        Raises:
            TypeError, ValueError: If it is something else, or lacks a field.
        """
        return self.template.format_map(self.values(example))

    def demonstration(self, example: Example, label: str) -> str:
        """An example with its label word."""
        return self.text(example) + self.word(label)

    def context(self, example: Example, demonstrations: Sequence[tuple[Example, str]] = ()) -> str:
        """Demonstrations and an example, joined by the separator, up to where the example's label goes."""
        parts = [self.demonstration(*demonstration) for demonstration in demonstrations]
        return self.separator.join([*parts, self.text(example)])

    def generation_prompt(self, example: Example, label: str, conditioned: bool = True) -> str:
        """Asks for an example of a class.

        Args:
            example: What it is to be like; of its fields, those that aren't generated are kept.
            label: The class.
            conditioned: Whether the prompt shows the field that is generated anew (the paper's method), or the class
                alone.

        Raises:
            ValueError: If the task has no such template.
        """
        template = self.generation_template if conditioned else self.class_only_template or self.generation_template
        if template is None:
            raise ValueError(f"task {self.name!r} has no generation_template, so it can't generate demonstrations.")
        return template.format_map({**self.values(example), LABEL: self.word(label)})

    def generated(self, example: Example, text: str) -> dict[str, str]:
        """The example with its generated field replaced."""
        return {**self.values(example), str(self.generated_field): text}

    def word(self, label: str) -> str:
        """A label's word."""
        if label not in self.labels:
            raise ValueError(f"label={label!r} is unknown to task {self.name!r}; it has {list(self.labels)}.")
        return self.labels[label]

    def values(self, example: Example) -> dict[str, str]:
        """An example's fields, stripped of white space around them."""
        if isinstance(example, str):
            if len(self.fields) > 1:
                raise TypeError(f"task {self.name!r} has the fields {self.fields}; pass a mapping, got a string.")
            example = {self.fields[0]: example}
        if not isinstance(example, Mapping):
            raise TypeError(f"an example must be a string or a mapping of fields, got {type(example).__name__}.")
        missing = [name for name in self.fields if name not in example]
        if missing:
            raise ValueError(f"an example lacks the field {missing[0]!r}; it has {list(example)}.")
        values = {name: example[name] for name in self.fields}
        for name, value in values.items():
            if not isinstance(value, str):
                raise TypeError(f"field {name!r} of an example must be a string, got {type(value).__name__}.")
        return {name: value.strip() for name, value in values.items()}

    def _check_labels(self) -> None:
        if len(self.labels) < 2:
            raise ValueError(
                f"labels={self.labels!r}: a task needs at least two, there is nothing to decide otherwise."
            )
        labels: dict[str, str] = {}
        for label, word in self.labels.items():
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"labels: the word of {label!r} is {word!r}; it must be a text.")
            if word in labels:
                raise ValueError(
                    f"labels: {labels[word]!r} and {label!r} have the same word {word!r}; give each its own."
                )
            labels[word] = label

    def _check_generation(self, name: str) -> None:
        template = getattr(self, name)
        if template is None:
            return
        slots = _slots(template, name)
        if LABEL not in slots:
            raise ValueError(f"{name}={template!r} has no slot {{label}}, so it can't ask for a class.")
        unknown = [slot for slot in slots if slot not in (*self.fields, LABEL)]
        if unknown:
            raise ValueError(f"{name}={template!r}: nothing fills {unknown[0]!r}; slots are {(*self.fields, LABEL)}.")


def _slots(template: Any, name: str) -> list[str]:
    """The names in braces, each once."""
    if not isinstance(template, str):
        raise TypeError(f"{name} must be a string, got {type(template).__name__}.")
    try:
        slots = [slot for _, slot, _, _ in Formatter().parse(template) if slot is not None]
    except ValueError as error:
        raise ValueError(
            f"{name}={template!r} is no template: {error}; double a brace that is part of the text."
        ) from error
    wrong = [slot for slot in slots if not slot.isidentifier()]
    if wrong:
        raise ValueError(f"{name}={template!r}: the slot {{{wrong[0]}}} has no name; write it as '{{text}}'.")
    return list(dict.fromkeys(slots))


# SG-ICL's, as in its released code; label words bring their space into the quotes too.
SST2 = Task(
    name="sst2",
    template="Review : {text}\nSentiment :",
    labels={"negative": " negative", "positive": " positive"},
    generation_template='Generate a review : {text}\nGenerate a "{label}" review :',
    class_only_template='Generate a "{label}" review :',
)
SST5 = replace(
    SST2,
    name="sst5",
    labels={
        "very negative": " terrible",
        "negative": " bad",
        "neutral": " okay",
        "positive": " good",
        "very positive": " great",
    },
    max_new_tokens=23,
)
RTE = Task(
    name="rte",
    template="Premise : {premise}\nHypothesis : {hypothesis}\nTrue or False? ",
    labels={"entailment": " true", "not_entailment": " false"},
    generation_template='Premise : {premise}\nGenerate a Hypothesis : {hypothesis}\nGenerate a "{label}" Hypothesis :',
    class_only_template='Premise : {premise}\nGenerate a "{label}" Hypothesis :',
    generated_field="hypothesis",
)
CB = replace(
    RTE,
    name="cb",
    template="Premise : {premise}\nHypothesis : {hypothesis}\nYes, No, or Neither?",
    labels={"entailment": " yes", "contradiction": " no", "neutral": " neither"},
    max_new_tokens=10,
)
TASKS: dict[str, Task] = {task.name: task for task in (SST2, SST5, RTE, CB)}
