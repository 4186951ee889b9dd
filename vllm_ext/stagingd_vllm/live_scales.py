# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The scales of a worker's live weights: made from a version's moments, and put where the engine reads them."""

from __future__ import annotations

import itertools

import torch

from stagingd.moments import StoredMoments
from stagingd_vllm.carriers import carrier
from stagingd_vllm.recipe import Recipe, ScaleSpan


class LiveScales:
    """All scales of one worker.

    What moments do not tell, blocks that fusing or tensor parallelism cuts elsewhere than the stage's grid, follows
    from the greatest magnitude of the worker's own slice, whatever the scale rule.

    Args:
        recipe: which scales there are, and what they are made of.
        device: where they are.
        beside: whether the device computes meanwhile.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, beside: bool = False) -> None:
        self._recipe = recipe
        self._device = device
        self._peaks = carrier(recipe.peaks, device, beside=beside) if recipe.peaks else None
        count = sum(span.count for span in recipe.spans)
        self._host = torch.empty(count, dtype=torch.float32, pin_memory=device.type == "cuda")
        self._live = [_flat(span) for span in recipe.spans]
        self._staged = [self._host[span.first : span.first + span.count] for span in recipe.spans]
        # One formula for all scales of a scheme: thousands of small operations would take longer than the read.
        self._ranges = [
            (None if from_slice else scheme.formula, slice(some[0].first, some[-1].first + some[-1].count))
            for (scheme, from_slice), group in itertools.groupby(
                recipe.spans, lambda span: (span.scheme, span.from_slice)
            )
            if (some := list(group))
        ]

    def set(self, slot: torch.Tensor, stored: StoredMoments) -> None:
        """Set all scales to a version's; on a GPU this is work of the current stream.

        Args:
            slot: the version's bytes, uint8.
            stored: its moments.
        """
        if not self._live:
            return
        limits = torch.from_numpy(self._recipe.limits.of(stored))
        # A copy of the version before has been waited for (Receiver.apply), so the memory is free to be written.
        for formula, some in self._ranges:
            self._host[some] = limits[some] if formula is None else formula(limits[some], self._device)
        torch._foreach_copy_(self._live, self._staged, non_blocking=True)
        if self._peaks is not None:
            self._peaks.carry(slot)
            for span, live in zip(self._recipe.spans, self._live, strict=True):
                if span.from_slice:
                    live.copy_(span.scheme.formula(live, self._device))


def _flat(span: ScaleSpan) -> torch.Tensor:
    assert span.home.scale is not None
    return span.home.scale.view(-1)
