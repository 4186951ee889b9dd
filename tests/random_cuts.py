# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors cut into boxes anywhere, as no trainer would."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from stagingd.boxes import Box, whole


@st.composite
def cuts(draw: st.DrawFn, shape: Sequence[int], most: int = 4) -> list[Box]:
    """Boxes that together are a tensor of this shape, made by cutting one in two, again and again."""
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, most))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(1, max(1, box.lengths[dim] - 1)))
        boxes += [part for part in (_from_to(box, dim, 0, at), _from_to(box, dim, at, box.lengths[dim])) if part.volume]
    return boxes


def _from_to(box: Box, dim: int, start: int, end: int) -> Box:
    offsets, lengths = list(box.offsets), list(box.lengths)
    offsets[dim] += start
    lengths[dim] = end - start
    return Box(tuple(offsets), tuple(lengths))
