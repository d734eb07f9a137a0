"""How far a quantized weight is from its source, summed up strip by strip."""

from __future__ import annotations

import math

import torch


class Deviation:
    """Squared error and squared size of a weight, and the largest error over half a step, strip by strip."""

    def __init__(self) -> None:
        self.error = self.size = self.worst = 0.0
        self.at = (0, 0, 0)

    @property
    def relative(self) -> float:
        """Frobenius norm of the error over that of the weight."""
        return math.sqrt(self.error / self.size) if self.size else math.sqrt(self.error)

    def add(
        self, error: torch.Tensor, exact: torch.Tensor, half_step: torch.Tensor, place: tuple[int, int]
    ) -> None:
        """Count a strip (rows, K) of absolute errors, which lies at `place` (expert, row)."""
        self.error += float(error.square().sum(dtype=torch.float64))
        self.size += float(exact.square().sum(dtype=torch.float64))
        over = error / half_step
        highest, at = float(over.max()), int(over.argmax())
        if not highest <= self.worst:
            self.worst = highest
            self.at = (place[0], place[1] + at // exact.shape[1], at % exact.shape[1])
