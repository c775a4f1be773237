"""A linear readout of unit features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class Readout:
    """A class matrix ``(C, d)`` and what its products with features are multiplied by."""

    weights: Tensor
    scale: float

    def log_probs(self, features: Tensor) -> Tensor:
        """Log-probabilities ``(n, C)`` of unit features ``(n, d)``."""
        return F.log_softmax(self.scale * features @ self.weights.T, dim=-1)
