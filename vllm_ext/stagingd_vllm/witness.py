# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A sample of the live weights, which tells whether something else has written to them since it was taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

PARAMETERS: Final = 64
BYTES: Final = 256
"""So many bytes of so many parameters at most, spread evenly, stand for the weights."""
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Witness:
    """Where a sample is taken, worked out once: it is taken between two steps, where every operation counts.

    Args:
        weights: the live weights, in an order that does not change; they stay where they are.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        listed = list(weights)
        self._views: dict[torch.dtype, list[torch.Tensor]] = {}
        for weight in listed[:: -(-len(listed) // PARAMETERS)]:
            view = _spread(weight)
            self._views.setdefault(view.dtype, []).append(view)

    def look(self) -> torch.Tensor:
        """The sample as it is now: uint8, on the weights' device."""
        return torch.cat([torch.cat(views).view(torch.uint8) for views in self._views.values()])


def _spread(weight: torch.Tensor) -> torch.Tensor:
    """Some elements, as integers of their size: evenly over its memory, whatever the order of its dims."""
    count = min(weight.numel(), BYTES // weight.element_size())
    view = torch.as_strided(weight.detach(), (count,), (weight.numel() // count,), weight.storage_offset())
    return view.view(_INTEGERS[weight.element_size()])
