"""When during sampling PuLID acts, and how strongly, answered on the device: nothing here waits for a GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _smooth(t: float) -> float:
    return t * t * (3 - 2 * t)


# Strength at t, 0..1 through the range.
CURVES: dict[str, Callable[[float], float]] = {
    "flat": lambda t: 1.0,
    "ease in": _smooth,
    "ease out": lambda t: 1 - _smooth(t),
    "ease in-out": lambda t: math.sin(math.pi * t),
}
KNOTS = 33  # of a curve; between them it is straight


@dataclass(frozen=True, eq=False)
class Schedule:
    """A range of noise levels, both ends included, with a strength at each.

    start, end  sigmas, start >= end: sampling goes from large sigmas to small ones
    sigmas      (K,) float32, rising; empty when the strength is 1 throughout
    strengths   (K,) float32
    percents    what it was made of: start_at, end_at and curve
    """

    start: float
    end: float
    sigmas: Tensor
    strengths: Tensor
    percents: tuple[float, float, str]

    @classmethod
    def make(
        cls,
        percent_to_sigma: Callable[[float], float],
        start_at: float,
        end_at: float,
        curve: str = "flat",
        device: torch.device | None = None,
    ) -> "Schedule | None":
        """From percents of sampling, 0..1, by the model's own `percent_to_sigma`; None where it would always be 1."""
        if curve == "flat" and start_at <= 0 and end_at >= 1:
            return None
        steps = [] if curve == "flat" else [i / (KNOTS - 1) for i in range(KNOTS)]
        inner = [min(max(start_at + (end_at - start_at) * t, 1e-3), 1 - 1e-3) for t in steps]
        sigmas = [percent_to_sigma(percent) for percent in inner]
        return cls(
            start=percent_to_sigma(start_at),
            end=percent_to_sigma(end_at),
            sigmas=torch.tensor(sigmas[::-1], dtype=torch.float32, device=device),
            strengths=torch.tensor([CURVES[curve](t) for t in steps][::-1], dtype=torch.float32, device=device),
            percents=(start_at, end_at, curve),
        )

    def strength(self, sigma: Tensor) -> Tensor:
        """The strength, a 0-dimensional tensor like sigma: 0 outside the range."""
        inside = (sigma <= self.start) & (sigma >= self.end)
        if self.sigmas.numel() == 0:
            return inside.to(sigma)
        sigmas, strengths = self.sigmas.to(sigma), self.strengths.to(sigma)
        right = (sigmas < sigma).sum().clamp(1, len(sigmas) - 1).view(1)
        # index_select, since indexing with a 0-dimensional tensor would wait for it
        low, high = sigmas.index_select(0, right - 1), sigmas.index_select(0, right)
        across = ((sigma - low) / (high - low)).clamp(0, 1)
        strength = torch.lerp(strengths.index_select(0, right - 1), strengths.index_select(0, right), across)
        return strength.squeeze(0) * inside
