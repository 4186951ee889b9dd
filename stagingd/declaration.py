# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The declaration of a stage: all trainer ranks say what they hold, then its memory is made, once for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgpack
import structlog
from pydantic import ValidationError

from stagingd import catalog
from stagingd.catalog import Catalog
from stagingd.errors import CatalogMismatch, InternalError, SegmentUnreadable, StagingError
from stagingd.record import Record
from stagingd.segment import Segment
from stagingd.waiting import Waiting, named
from stagingd.wire import Declare, StageOptions

log = structlog.get_logger()

MakeSegment = Callable[[Catalog, bytes], Segment]
"""Allocates a stage's memory, given its catalog and its terms."""

Submit = Callable[[Callable[[], Segment]], "Future[Segment]"]
"""Has it done in the background: for a large model it takes seconds."""


class Terms(Record):
    """What the ranks agreed on besides the catalog. It stands in the segment, so that it outlives the daemon.

    ``digests`` are of each rank's tensors and aliases: a rank that comes back declares the same ones, replicas
    included.
    """

    options: StageOptions
    digests: tuple[bytes, ...]

    def encode(self) -> bytes:
        """As it stands in the segment."""
        packed: bytes = msgpack.packb(self.model_dump())
        return packed

    @classmethod
    def decode(cls, segment: str, data: bytes) -> Terms:
        """Read it. Raises SegmentUnreadable."""
        try:
            return cls.model_validate(msgpack.unpackb(data, use_list=False))
        except (ValueError, msgpack.UnpackException, ValidationError) as error:
            raise SegmentUnreadable(
                f"the terms in segment {segment} are not readable: {error}",
                remedy="declare the stage anew; its versions are lost",
            ) from error

    def check_same(self, message: Declare, made: Catalog) -> None:
        """Refuse a rank that comes back with other tensors than the stage was made from. Raises CatalogMismatch."""
        check_agreement(message, len(self.digests), self.options)
        if digest(message) != self.digests[message.rank]:
            raise _mismatch(message, f"{_difference(message, made)}, unlike at first")


class Declaration:
    """Collects what the ranks declare, and has the memory made when all have.

    ``error`` is set when the declarations do not fit together or there is no memory: every rank is told, nothing
    is made, and the ranks start again with a new declaration.
    """

    def __init__(self, stage: str, ranks: int, options: StageOptions, make: MakeSegment, submit: Submit) -> None:
        self.stage = stage
        self.ranks = ranks
        self.options = options
        self.by_rank: dict[int, Declare] = {}
        self.terms: Terms | None = None
        self.error: StagingError | None = None
        self._make = make
        self._submit = submit
        self._making: Future[Segment] | None = None

    def anew(self) -> Declaration:
        """A declaration of the same stage of which no rank has declared."""
        return Declaration(self.stage, self.ranks, self.options, self._make, self._submit)

    def add(self, message: Declare) -> None:
        """A rank declares; the last one starts the making.

        Raises:
            CatalogMismatch: the rank has another idea of the number of ranks, of the options, or, when it
                declares once more, of its tensors.
        """
        check_agreement(message, self.ranks, self.options)
        if self.terms is not None:
            if digest(message) != self.terms.digests[message.rank]:
                raise _mismatch(message, "it declares other tensors than at first")
            return
        self.by_rank[message.rank] = message
        if len(self.by_rank) == self.ranks:
            everybody = [self.by_rank[rank] for rank in range(self.ranks)]
            self.terms = terms = Terms(options=self.options, digests=tuple(map(digest, everybody)))
            self._making = self._submit(lambda: self._made(everybody, terms))

    def _made(self, everybody: Sequence[Declare], terms: Terms) -> Segment:
        tensors = [message.tensors for message in everybody]
        aliases = [message.aliases for message in everybody]
        made = catalog.build(self.stage, tensors, self.options.grids, aliases, self.options.quantization)
        return self._make(made, terms.encode())

    def forget(self, rank: int) -> None:
        """A rank is gone before all have declared."""
        if self.terms is None:
            self.by_rank.pop(rank, None)

    def finish(self) -> Segment | None:
        """The segment once it is made. None while it is not, and when it cannot be: see ``error``."""
        if self._making is None or not self._making.done():
            return None
        failure = self._making.exception()
        if failure is None:
            return self._making.result()
        if not isinstance(failure, StagingError):
            # Said to the ranks instead of ending the daemon, whose successor they would ask the same.
            log.error("declaration_failed", stage=self.stage, exc_info=failure)
            failure = InternalError(
                f"the memory of stage {self.stage!r} cannot be made: {failure!r}", remedy="report this"
            )
        self.error = failure
        return None

    @property
    def awaited(self) -> Waiting:
        """The ranks that have not declared; then the memory."""
        if self.terms is not None:
            return Waiting(f"the memory of stage {self.stage!r} to be allocated", ("the daemon",))
        missing = named("trainer rank", (rank for rank in range(self.ranks) if rank not in self.by_rank))
        return Waiting(f"all {self.ranks} ranks of stage {self.stage!r} to declare", missing)


def digest(message: Declare) -> bytes:
    """SHA-256 of one rank's declaration, in any order of its tensors and aliases."""
    tensors = sorted((tensor.name, tensor.dtype, tensor.shape, tensor.boxes) for tensor in message.tensors)
    aliases = sorted({(alias.alias, alias.name) for alias in message.aliases})
    return hashlib.sha256(msgpack.packb([tensors, aliases])).digest()


def check_agreement(message: Declare, ranks: int, options: StageOptions) -> None:
    """Refuse a rank that differs in what all ranks must have in common. Raises CatalogMismatch."""
    ours = {"ranks": ranks, **options.model_dump()}
    theirs = {"ranks": message.ranks, **message.options.model_dump()}
    for what, value in ours.items():
        if theirs[what] != value and what == "quantization":  # it may name thousands of tensors
            raise _mismatch(message, "it quantizes otherwise than the stage's other ranks, or other tensors")
        if theirs[what] != value:
            raise _mismatch(message, f"{what} is {theirs[what]}, but the stage's is {value}")
    if message.rank >= ranks:
        raise _mismatch(message, f"there are only {ranks} ranks")


def _difference(message: Declare, made: Catalog) -> str:
    """In what a declaration differs from the stage, as far as the catalog tells."""
    known = {tensor.name: tensor for tensor in made.tensors}
    for tensor in message.tensors:
        was = known.get(tensor.name)
        if was is None:
            return f"it declares tensor {tensor.name!r}, which the stage does not have"
        if (tensor.dtype, tensor.shape) != (was.value_dtype, was.shape):
            return f"tensor {tensor.name!r} is {tensor.dtype} {tensor.shape}, but was {was.value_dtype} {was.shape}"
    return "it declares other tensors, or other boxes or aliases of them"


def _mismatch(message: Declare, what: str) -> CatalogMismatch:
    return CatalogMismatch(
        f"rank {message.rank} does not fit stage {message.stage!r}: {what}",
        remedy=f"declare as before, or give the stage up first: stagingd drop {message.stage}",
        stage=message.stage,
        rank=message.rank,
    )
