# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How trainers order rows: rotary halves, fused q|k|v and gate|up, grouped experts. From one shard to boxes and views.

Every function takes what a rank holds of a trainer's tensor, cut anywhere, and gives what that is of the
Hugging Face ones. Nothing is copied: the values of each piece are a view of the shard's, in which the rows
may have more dims than in its box (see ``Held``). A cut costs a piece or two; what lies between two cuts,
however many heads or groups, is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stagingd.boxes import Box
from stagingd.errors import WrongShape
from stagingd_client.placement import Held


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer.

    Attributes:
        queries: number of query heads.
        groups: number of key-value heads: each serves a group of query heads.
        rows: rows per head, also called the head's dim.

    Raises:
        WrongShape: the groups do not divide the query heads.
    """

    queries: int
    groups: int
    rows: int

    def __post_init__(self) -> None:
        if self.queries % self.groups:
            raise WrongShape(
                f"{self.queries} query heads do not divide into {self.groups} groups",
                remedy="give the model's numbers of query and of key-value heads",
            )

    @property
    def queries_per_group(self) -> int:
        """How many query heads share a key-value head."""
        return self.queries // self.groups

    @property
    def group_rows(self) -> int:
        """Rows of one group of a fused q|k|v tensor: those of its query heads, then one key, then one value head."""
        return (self.queries_per_group + 2) * self.rows

    @property
    def fused_rows(self) -> int:
        """Rows of a fused q|k|v tensor."""
        return self.groups * self.group_rows


@dataclass(frozen=True)
class Band:
    """The rows of a tensor whose number, modulo ``period``, is ``offset`` or up to ``width`` - 1 more.

    Taken together they are a tensor of their own, which has ``width`` rows per period.
    """

    period: int
    offset: int
    width: int

    def begin(self, period: int) -> int:
        """The first row of the band in a period."""
        return period * self.period + self.offset


def band(part: Held, wanted: Band) -> Iterator[Held]:
    """What a shard holds of a band: a piece of the first period, one of all whole periods, a piece of the last.

    Args:
        part: a shard, cut anywhere; its values have the shape of its box.
        wanted: a band whose period divides the rows of the global tensor.

    Yields:
        Up to three parts of the band's own tensor. Several whole periods are a view of one more dim,
        (periods, width, ...).
    """
    start, stop = _rows(part)
    rows = part.global_shape[0] // wanted.period * wanted.width
    first = -((wanted.offset - start) // wanted.period)  # of the periods whose band is held as a whole
    last = (stop - wanted.offset - wanted.width) // wanted.period + 1  # one past them
    alone = tuple(range(first - 1, last + 1))
    if last - first > 1:
        alone = (first - 1, last)
        begin, end = wanted.begin(first), wanted.begin(last - 1) + wanted.width
        windows = part.values[begin - start : end - start].unfold(0, wanted.width, wanted.period).movedim(-1, 1)
        yield _placed(part, rows, first * wanted.width, (last - first) * wanted.width, windows)
    for period in alone:
        begin = max(wanted.begin(period), start)
        end = min(wanted.begin(period) + wanted.width, stop)
        if begin < end:
            row = period * wanted.width + begin - wanted.begin(period)
            yield _placed(part, rows, row, end - begin, part.values[begin - start : end - start])


def rotary(part: Held, head_rows: int) -> Iterator[Held]:
    """Interleaved rotary rows, as the original Llama has them, to the halves that Hugging Face has.

    Row ``2i + j`` of a head becomes its row ``j * head_rows / 2 + i``. That changes the order inside heads
    only, so the heads that are held as a whole are one piece; a cut inside a head costs two more.

    Args:
        part: a shard, cut anywhere, or a piece that ``band`` gave, which then has to consist of whole heads.
        head_rows: rows per head; even.

    Yields:
        Parts of the tensor in the other order.
    """
    if part.values.dim() > len(part.global_shape):
        yield Held(part.global_shape, part.box, _halves(part.values, 1, head_rows))
        return
    start, stop = _rows(part)
    first, last = -(-start // head_rows) * head_rows, stop // head_rows * head_rows
    if first < last:
        whole = _halves(part.values[first - start : last - start], 0, head_rows)
        yield _placed(part, part.global_shape[0], first, last - first, whole)
    for begin, end in ((start, min(first, stop)), (max(first, last), stop)):
        if begin < end:
            yield from _cut_head(part, begin, end, head_rows)


def _halves(values: torch.Tensor, dim: int, head_rows: int) -> torch.Tensor:
    shape = values.shape
    heads = (shape[dim] // head_rows, head_rows // 2, 2)
    return values.view(*shape[:dim], *heads, *shape[dim + 1 :]).transpose(dim + 1, dim + 2)


def _cut_head(part: Held, begin: int, end: int, head_rows: int) -> Iterator[Held]:
    """The rows [begin, end), all of one head: every second row is of the same half."""
    start, _ = _rows(part)
    head = begin // head_rows * head_rows
    for half in (0, 1):
        first = begin + (begin - head - half) % 2
        values = part.values[first - start : end - start : 2]
        if values.shape[0]:
            row = head + half * (head_rows // 2) + (first - head) // 2
            yield _placed(part, part.global_shape[0], row, values.shape[0], values)


def fused_qkv(part: Held, heads: Heads) -> Iterator[tuple[str, Held]]:
    """Split rows that are, per group, its query heads, its key head and its value head.

    That is how Megatron's ``linear_qkv`` and TorchTitan's ``wqkv`` are.

    Args:
        part: a shard, cut anywhere.
        heads: those of the layer.

    Yields:
        "q", "k" or "v", and a part of that tensor: one for all whole groups, and one for each cut.
    """
    query_rows = heads.queries_per_group * heads.rows
    widths = {"q": query_rows, "k": heads.rows, "v": heads.rows}
    offset = 0
    for which, width in widths.items():
        for piece in band(part, Band(heads.group_rows, offset, width)):
            yield which, piece
        offset += width


def gate_up(part: Held, ranks: int) -> Iterator[tuple[str, Held]]:
    """Split rows that are, per tensor-parallel rank, its part of gate and then its part of up.

    That is how Megatron's ``linear_fc1`` is when the ranks' tensors are stacked in their order.

    Args:
        part: a shard of the stacked tensor, cut anywhere.
        ranks: the tensor-parallel size; twice that divides the rows of the stacked tensor.

    Yields:
        "gate" or "up", and a part of that tensor.
    """
    width = part.global_shape[0] // (2 * ranks)
    for which, offset in (("gate", 0), ("up", width)):
        for piece in band(part, Band(2 * width, offset, width)):
            yield which, piece


def experts(part: Held) -> Iterator[tuple[int, Held]]:
    """Split a grouped tensor (experts, ...) into one of each expert.

    Yields:
        The number of an expert that the shard has, and what it has of that expert's tensor.
    """
    box = Box(part.box.offsets[1:], part.box.lengths[1:])
    for number, values in enumerate(part.values.unbind(0), part.box.offsets[0]):
        yield number, Held(part.global_shape[1:], box, values)


def trimmed(part: Held, rows: int) -> Iterator[Held]:
    """Drop the padding behind the first ``rows`` rows of a tensor. Yields nothing where a shard is all padding."""
    start, stop = _rows(part)
    count = min(stop, rows) - start
    if count > 0:
        yield _placed(part, rows, start, count, part.values[:count])


def _rows(part: Held) -> tuple[int, int]:
    return part.box.offsets[0], part.box.ends[0]


def _placed(part: Held, rows: int, first: int, count: int, values: torch.Tensor) -> Held:
    """The same columns, other rows: ``count`` of them from row ``first`` of a tensor that has ``rows``."""
    box = Box((first, *part.box.offsets[1:]), (count, *part.box.lengths[1:]))
    return Held((rows, *part.global_shape[1:]), box, values)
