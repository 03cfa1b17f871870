# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ViM: a virtual logit for what of a feature lies outside the training set's principal space."""

from __future__ import annotations

from typing import Optional

import numpy as np
from scipy.linalg import eigh
from scipy.special import logsumexp

from peft_ext.file_formats import Tensor, whole
from peft_ext.ood.detectors.base import Detector


class ViM(Detector):
    """Virtual-logit matching (Wang et al. 2022, https://huggingface.co/papers/2203.10807): the energy of the logits less
    `alpha |R (f - o)|`, the residual of the feature outside the principal space, scaled to match the largest logits.

    The origin o is the paper's, `-pinv(W) b`: where the head's logits are zero. W and b of the (affine) head are found
    from features and logits by least squares, which is exact.

    Args:
        dim: Dimensions of the principal space. None: the paper's, 1000 for features of 2048 or more, 512 from 768 on, half
            of the size below.
    """

    name = "vim"
    params = {"dim": whole(1).or_null()}
    tensors = {
        "origin": Tensor(("F64",), ("n",), note="where the head's logits are zero"),
        "residual": Tensor(("F64",), ("n", "r"), note="what spans the outside of the principal space"),
        "alpha": Tensor(("F64",), (1,)),
    }

    def __init__(self, dim: Optional[int] = None) -> None:
        self.dim = dim

    def _check_params(self) -> None:
        if self.dim is not None and (isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1):
            raise ValueError(f"dim={self.dim!r} must be a whole number of at least 1, or None.")

    def _fit(self, features, logits, labels) -> dict[str, np.ndarray]:
        size = features.shape[1]
        dim = self.dim or (1000 if size >= 2048 else 512 if size >= 768 else max(1, size // 2))
        if dim >= size:
            raise ValueError(f"dim={dim} leaves nothing of features of size {size} outside; choose a smaller one.")
        origin = _origin(features, logits)
        centred = features - origin
        vectors = eigh(centred.T @ centred / len(centred))[1]  # ascending: the principal ones are last
        residual = vectors[:, : size - dim]
        norms = np.linalg.norm(centred @ residual, axis=1)
        if not norms.any():
            raise ValueError(f"all features lie in {dim} dimensions, so no residual is left; choose a smaller dim.")
        alpha = logits.max(axis=1).mean() / norms.mean()  # equation 5
        return {"origin": origin, "residual": residual, "alpha": np.array([alpha])}

    def _score(self, features, logits) -> np.ndarray:
        residual = np.linalg.norm((features - self.state_["origin"]) @ self.state_["residual"], axis=1)
        return logsumexp(logits, axis=1) - self.state_["alpha"][0] * residual


def _origin(features: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """`-pinv(W) b` of the head that made the logits of the features; the zero vector if it has no bias."""
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    head = np.linalg.lstsq(design, logits, rcond=None)[0]
    weight, bias = head[:-1].T, head[-1]
    return -np.linalg.pinv(weight) @ bias
