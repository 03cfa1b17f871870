# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A reward model that doesn't rank by length and repetition.

Better answers of preference data are longer, and a reward model learns that first; a policy that is trained by it learns to be
long. Two steps, which leave a plain classifier with one score behind, so that whatever loads it scores alike:

1. In training, what length and repetition alone say of a pair is added to the difference of its rewards (TRL's `margin`, with
   the opposite sign), and is gone in use. The reward only has to explain what they don't (He et al. 2019, "DRiFt"; Clark et al.
   2019, "Don't take the easy way out").
2. Afterwards the head loses what still varies with them among answers that are equally good: chosen ones among chosen ones,
   rejected among rejected (ODIN, Chen et al. 2024, asks the same of a batch by a term of its loss). Of all such heads it is
   the one whose scores change least, in closed form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from generation_ext.shared_prefix.token_tree import padded
from peft_ext.language_model import device_of, inference
from trl_ext.almost.repetition import repeated_share


# Length twice: scores don't go with one of the two alone.
COVARIATES = ("log_tokens", "tokens", "repeated_share")
# Answers that the head's part is estimated by, at most: of its few hundred numbers, more say little.
MOST_ANSWERS = 4096
# Of the states' mean variance, added to each: of fewer answers than a state has numbers, the covariance can't be inverted.
_RIDGE = 0.05
# Of the logistic regression on length and repetition, which a perfect order by length would send to infinity.
_PENALTY = 1.0
_NEWTON_STEPS = 50


def covariates(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> np.ndarray:
    """`[answers, 3]`: the logarithm of an answer's tokens, the tokens, and its share of repeated word 3-grams."""
    ids = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"] if len(answers) else []
    return np.array(
        [[np.log(max(len(tokens), 1)), len(tokens), repeated_share(text)] for tokens, text in zip(ids, answers)],
        dtype=float,
    ).reshape(-1, len(COVARIATES))


def explained(chosen: np.ndarray, rejected: np.ndarray, others: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """What length and repetition alone say of pairs: the logit of the better answer under a logistic regression on the
    difference of their covariates.

    Args:
        chosen: Covariates `[pairs, k]` of the better answers; fitted to.
        rejected: Of the worse ones.
        others: Differences `[n, k]` of further pairs, such as held-out ones.

    Returns:
        Logits of the pairs, and of each of the others.
    """
    scale = np.concatenate([chosen, rejected]).std(axis=0)
    scale[scale == 0] = 1.0
    differences, weights = (chosen - rejected) / scale, np.zeros(chosen.shape[1])
    for _ in range(_NEWTON_STEPS):
        wrong = 1 / (1 + np.exp(np.clip(differences @ weights, -30, 30)))
        gradient = differences.T @ wrong - _PENALTY * weights
        curvature = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + _PENALTY * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    return [differences @ weights, *(other / scale @ weights for other in others)]


def without_covariates(weight: np.ndarray, states: np.ndarray, varying: np.ndarray) -> np.ndarray:
    """The head `[size]` closest to `weight`, by the scores that it gives, whose scores don't vary with the covariates.

    Args:
        weight: A linear head.
        states: What it reads of answers, `[answers, size]`, less the mean of equally good ones.
        varying: Their covariates `[answers, k]`, likewise.

    Returns:
        The new head: on these answers, the covariance of its scores with each covariate is zero.
    """
    spread = states.T @ states / len(states)
    spread = spread + (_RIDGE * np.trace(spread) / len(spread) + 1e-12) * np.eye(len(spread))
    scale = varying.std(axis=0)
    shared = states.T @ (varying / np.where(scale > 0, scale, 1.0)) / len(states)
    reading = np.linalg.solve(spread, shared)  # how the states tell the covariates
    # least squares, for a covariate that nothing varies with
    return weight - reading @ np.linalg.lstsq(shared.T @ reading, shared.T @ weight, rcond=1e-10)[0]


def correlations(scores: np.ndarray, varying: np.ndarray) -> dict[str, float]:
    """Correlation of scores `[n]` with each covariate; 0 where one of the two is constant."""
    centred, others = scores - scores.mean(), varying - varying.mean(axis=0)
    norms = np.sqrt((centred**2).sum() * (others**2).sum(axis=0))
    found = np.divide(centred @ others, norms, out=np.zeros(len(norms)), where=norms > 1e-12)
    return {name: float(value) for name, value in zip(COVARIATES, found)}


def control_head(
    model: nn.Module, rows: Sequence[Sequence[int]], varying: np.ndarray, padding: int, batch_size: int
) -> dict[str, Any]:
    """Take out of a reward model's head what varies with length and repetition among equally good answers.

    Args:
        model: The trained classifier, or a `PeftModel` of one; its head is changed in place.
        rows: Tokens of the chosen answers behind their prompts, then those of the rejected ones.
        varying: Covariates `[answers, k]` in the same order.
        padding: The padding token.
        batch_size: Texts per forward pass.

    Returns:
        `answers` and, of scores among equally good answers, the correlation with each covariate `before` and `after`.

    Raises:
        ValueError: If the model has no linear head of one score, or its states aren't finite numbers.
    """
    head = score_head(model)
    states = _states(model, head, rows, padding, batch_size)
    if not np.isfinite(states).all():
        raise ValueError(
            "length_control: the reward model's states aren't finite; train it with a lower learning rate."
        )
    half = len(rows) // 2
    centred = [
        np.concatenate([part - part.mean(axis=0) for part in np.split(each, [half])]) for each in (states, varying)
    ]
    old = head.weight.detach()[0].double().cpu().numpy()
    new = without_covariates(old, *centred)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(new)[None])
    before, after = (correlations(centred[0] @ weight, centred[1]) for weight in (old, new))
    return {"answers": len(rows), "before": before, "after": after}


def score_head(model: nn.Module) -> nn.Linear:
    """The linear layer that gives a reward model's score.

    Raises:
        ValueError: If there is none that is trained, or more than one.
    """
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and module.weight.requires_grad
    ]
    if len(heads) != 1:
        raise ValueError(
            f"length_control needs a reward model with one linear head of one score; {type(model).__name__} has {len(heads)}."
        )
    return heads[0]


def _states(
    model: nn.Module, head: nn.Module, rows: Sequence[Sequence[int]], padding: int, batch_size: int
) -> np.ndarray:
    """What the head reads of each row, where its score is read: `[rows, size]`."""
    states: Optional[np.ndarray] = None
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with inference(model), _inputs_of(head) as seen:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tokens, mask = padded([rows[index] for index in batch], padding, "right")
            seen.clear()
            model(input_ids=tokens.to(device_of(model)), attention_mask=mask.to(device_of(model)))
            read = seen[0]
            if read.dim() == 3:  # of every token; transformers reads the last one that isn't the padding token
                last = ((tokens != padding) * torch.arange(tokens.shape[1])).argmax(dim=1)
                read = read[torch.arange(len(batch)), last.to(read.device)]
            found = read.double().cpu().numpy()
            states = np.zeros((len(rows), found.shape[1])) if states is None else states
            states[batch] = found
    assert states is not None
    return states


@contextlib.contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()
