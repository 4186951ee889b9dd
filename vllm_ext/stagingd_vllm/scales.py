# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From merged moments to scales, by the engine's own arithmetic.

This is the one place where that arithmetic stands. A scale is the magnitude that one FP8 step of 1.0
stands for: ``value = quantized * scale``. Sources: vLLM's online FP8 methods, whose bytes and scales
these must equal: per tensor without a floor, per channel with one of 1 / (448 * 512) on the scale, per
128 x 128 block with one of 1e-4 on amax.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from stagingd.errors import StagingError
from stagingd.moments import Grid, Moments

FP8_MAX = 448.0
"""The greatest finite float8_e4m3fn."""


class ScaleRuleRefused(StagingError):
    """A scale rule is not one that is known."""

    code = "scale_rule_refused"


class Granularity(StrEnum):
    """What shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"

    @property
    def grid(self) -> Grid:
        """The grid whose cells are the scales' areas: a channel is a row."""
        return {Granularity.TENSOR: Grid.TENSOR, Granularity.CHANNEL: Grid.ROW, Granularity.BLOCK: Grid.BLOCK}[self]


@dataclass(frozen=True)
class ScaleRule:
    """How the largest magnitude to represent is chosen.

    Attributes:
        sigmas: clip at |mean| + sigmas standard deviations, where that is less than amax; None: never clip.
    """

    sigmas: float | None = None

    @classmethod
    def parse(cls, text: str) -> ScaleRule:
        """``amax``, or ``sigma:k`` with a positive number k. Raises ScaleRuleRefused."""
        if text == "amax":
            return cls()
        kind, _, number = text.partition(":")
        try:
            sigmas = float(number)
        except ValueError:
            sigmas = 0.0
        if kind != "sigma" or not sigmas > 0:
            raise ScaleRuleRefused(f"{text!r} is no scale rule", remedy="use amax, or sigma:k such as sigma:6")
        return cls(sigmas)

    def limits(self, moments: Moments) -> torch.Tensor:
        """The largest magnitude to represent per cell: float32, of the cells' shape."""
        amax = moments.amax
        if self.sigmas is not None:
            bound = np.abs(moments.mean) + self.sigmas * np.sqrt(moments.variance)
            amax = np.minimum(amax, bound.astype(np.float32))
        return torch.from_numpy(np.ascontiguousarray(amax))


def scales(limits: torch.Tensor, granularity: Granularity, engine: torch.device | None = None) -> torch.Tensor:
    """The scale of each cell.

    Args:
        limits: the largest magnitude to represent per cell, float32.
        granularity: which of the engine's formulae.
        engine: the device on which the engine makes its own; that of ``limits``, if none is given. Per block it
            divides by a number, not by a tensor: for that torch multiplies by the reciprocal, in float32, on GPUs.

    Returns:
        float32, of the same shape. Per tensor an all-zero tensor has scale 0, as in the engine.
    """
    fp8_max = torch.tensor(FP8_MAX, dtype=torch.float32, device=limits.device)
    if granularity is Granularity.TENSOR:
        return limits / fp8_max
    if granularity is Granularity.CHANNEL:
        return (limits / fp8_max).clamp_min(1.0 / (FP8_MAX * 512.0))
    limits = limits.clamp_min(1e-4)
    return limits / fp8_max if (engine or limits.device).type == "cpu" else limits * fp8_max.reciprocal()
