# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What trainers of the tests of ``benchmarks.compare`` do: imported in their processes, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.compare.trainer import Rank, UsualSender


class Tell(UsualSender):
    """Asks for what it has, whole."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def send(self, version: int) -> None:
        sums = {name: float(tensor.double().sum()) for name, tensor in self._rank.whole()}
        self._rank.ask((version, self._rank.post.rank, sums, sorted(dict(self._rank.whole_part()))))

    def host_bytes(self) -> int:
        return 10 + self._rank.post.rank


class Fail(Tell):
    """Raises."""

    def send(self, version: int) -> None:
        raise RuntimeError("no such device")


class Die(Tell):
    """Ends in the middle."""

    def send(self, version: int) -> None:
        os._exit(3)


@contextmanager
def tell(rank: Rank) -> Iterator[Tell]:
    torch.set_num_threads(1)
    yield Tell(rank)


@contextmanager
def fail(rank: Rank) -> Iterator[Fail]:
    yield Fail(rank)


@contextmanager
def die(rank: Rank) -> Iterator[Die]:
    yield Die(rank)
