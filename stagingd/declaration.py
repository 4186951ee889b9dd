# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The declaration of a stage: all trainer ranks say what they hold, then it is decided, once for all."""

from __future__ import annotations

from stagingd import catalog
from stagingd.buffer import Waiting
from stagingd.catalog import Catalog, TensorDeclaration
from stagingd.errors import CatalogMismatch, StagingError
from stagingd.wire import Declare, StageOptions


class Declaration:
    """Collects what the ranks declare.

    ``error`` is set when the declarations do not fit together: every rank is told, nothing is made, and
    the ranks start again with a new declaration.
    """

    def __init__(self, stage: str, ranks: int, options: StageOptions) -> None:
        self.stage = stage
        self.ranks = ranks
        self.options = options
        self.by_rank: dict[int, tuple[TensorDeclaration, ...]] = {}
        self.error: StagingError | None = None

    def add(self, message: Declare) -> Catalog | None:
        """A rank declares. Returns the catalog when this was the last rank.

        Raises:
            CatalogMismatch: the rank has another idea of the number of ranks or of the options.
            StagingError: whatever ``catalog.build`` refuses; also kept in ``error``.
        """
        self.check_agreement(message)
        self.by_rank[message.rank] = message.tensors
        if len(self.by_rank) < self.ranks:
            return None
        try:
            return catalog.build(self.stage, [self.by_rank[rank] for rank in range(self.ranks)], self.options.grids)
        except StagingError as error:
            self.error = error
            raise

    def check_agreement(self, message: Declare) -> None:
        """Refuse a rank that differs in what all ranks must have in common. Raises CatalogMismatch."""
        ours = {"ranks": self.ranks, **self.options.model_dump()}
        theirs = {"ranks": message.ranks, **message.options.model_dump()}
        for what, value in ours.items():
            if theirs[what] != value:
                raise self._mismatch(message.rank, f"{what} is {theirs[what]}, but the stage's is {value}")
        if message.rank >= self.ranks:
            raise self._mismatch(message.rank, f"there are only {self.ranks} ranks")

    def check_same(self, message: Declare) -> None:
        """Refuse a rank that comes back with other tensors than the stage was made from. Raises CatalogMismatch."""
        self.check_agreement(message)
        before = {tensor.name: tensor for tensor in self.by_rank[message.rank]}
        now = {tensor.name: tensor for tensor in message.tensors}
        for name in before | now:
            if before.get(name) != now.get(name):
                raise self._mismatch(message.rank, f"tensor {name!r} is {now.get(name)}, but was {before.get(name)}")

    def _mismatch(self, rank: int, what: str) -> CatalogMismatch:
        return CatalogMismatch(
            f"rank {rank} does not fit stage {self.stage!r}: {what}",
            remedy=f"declare as before, or give the stage up first: stagingd drop {self.stage}",
            stage=self.stage,
            rank=rank,
        )

    @property
    def awaited(self) -> Waiting:
        """The ranks that have not declared."""
        missing = tuple(f"trainer rank {rank}" for rank in range(self.ranks) if rank not in self.by_rank)
        return Waiting(f"all {self.ranks} ranks of stage {self.stage!r} to declare", missing)
