# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer's side of a stage: declare once, then begin, put, commit per version.

    with Stage.open("policy") as stage:                # rank and world size from torch.distributed
        for step in range(1, steps + 1):
            train(model)
            stage.fence()                              # the step before has left the parameters
            optimizer.step()
            stage.publish(step, model)                 # returns at once

``begin``, ``put`` and ``commit`` only queue work for one background thread: it asks the daemon for a
slot, flushes, and commits. So the trainer goes on at once. What has to wait is the optimizer, until the
parameters have been read: ``fence`` has the device wait, not the host; shards in host memory it waits for.

What fails in the background is raised by the first of ``fence``, the publication's ``wait``, and the
next ``begin``. The version is lost then, and nothing else: go on with the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from stagingd import segment, wire
from stagingd.aliases import Alias
from stagingd.catalog import Catalog, OwnedBox
from stagingd.connection import ANSWER_S, Connection, Expected
from stagingd.errors import (
    DaemonUnreachable,
    OutOfOrder,
    VersionNotRising,
)
from stagingd.formats import Quantization, read_quantization
from stagingd.moments import ALL_GRIDS, Grid
from stagingd.policy import Policy
from stagingd_client import flushers
from stagingd_client.flushers import Flushers
from stagingd_client.holdings import Holdings, Put, Shards
from stagingd_client.modules import Modules
from stagingd_client.naming import Names, SameNames
from stagingd_client.placement import LocalShard
from stagingd_client.publication import Batch, Publication
from stagingd_client.queues import Mark

BATCH_BYTES = 2**30
"""Shards that are put one by one are flushed together, so many bytes at once, ..."""
BATCH_S = 0.01
"""... unless all of them come within so many seconds. To queue copies takes Python, in another thread, which holds up
the one that puts."""
PUT_S = 1e-4
"""The same for each shard, of many small ones: they would else be cut at another one in every version, and what is
flushed together for the first time is planned first."""


class Stage:
    """One trainer rank's connection to a stage. Use ``Stage.open``; not for several threads at once."""

    def __init__(
        self,
        name: str,
        connection: Connection,
        rank: int,
        ranks: int,
        dtype: torch.dtype | None,
        options: wire.StageOptions,
        timeout_s: float,
        names: Names,
        open_device: Callable[[torch.device, segment.Segment], flushers.Opened] = flushers.open_device,
    ) -> None:
        self.name = name
        self.rank = rank
        self.ranks = ranks
        self.timeout_s = timeout_s
        self._options = options
        self._connection = connection
        self._dtype = dtype
        self._names = names
        self._open_device = open_device
        self._modules: Modules | None = None
        self._holdings: Holdings | None = None
        self._owned: dict[str, list[OwnedBox]] = {}
        self._boxes_owned = 0
        self._segment: segment.Segment | None = None
        self._flushers: Flushers | None = None
        self._newest: int | None = None
        self._current: Publication | None = None
        self._last: Publication | None = None
        self._in_doubt: int | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix=f"stagingd-{name}")

    @classmethod
    def open(
        cls,
        name: str,
        *,
        rank: int | None = None,
        ranks: int | None = None,
        socket: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = torch.bfloat16,
        policy: Policy | str = Policy.LATEST,
        grids: Iterable[Grid | str] = ALL_GRIDS,
        on_non_finite: wire.OnNonFinite | str = wire.OnNonFinite.REJECT,
        quantization: Quantization | str | os.PathLike[str] | None = None,
        timeout_s: float = 60.0,
        names: Names | None = None,
    ) -> Stage:
        """Connect to the daemon of this node.

        Args:
            name: the stage's name, such as "policy".
            rank, ranks: this trainer rank and their number; those of torch.distributed by default, else 0 of 1.
            socket: the daemon's control socket; that of the settings by default.
            dtype: floating-point parameters are staged in it; None keeps their own.
            policy: what beginning a version does while a sealed one has not been read: ``latest`` or ``block``.
            grids: what moments are kept for.
            on_non_finite: ``reject`` a version with NaN or infinite values, or ``warn``.
            quantization: what the trainers quantize before it is staged, and how, or a file that says so, as
                ``python -m stagingd_vllm.plan_command --quantization-file`` writes it; nothing by default.
            timeout_s: the longest that anything waits, in seconds.
            names: how the trainer's tensors are named and ordered; as the stage's by default.

        Raises:
            DaemonUnreachable, SocketNotTrusted: there is no daemon to talk to.
            QuantizationUnreadable: the file does not say what is quantized.
        """
        if isinstance(quantization, str | os.PathLike):
            quantization = read_quantization(quantization)
        distributed = dist.is_available() and dist.is_initialized()
        rank = rank if rank is not None else dist.get_rank() if distributed else 0
        ranks = ranks if ranks is not None else dist.get_world_size() if distributed else 1
        options = wire.StageOptions(
            policy=Policy(policy),
            grids=tuple(Grid(grid) for grid in grids),
            on_non_finite=wire.OnNonFinite(on_non_finite),
            quantization=quantization,
        )
        connection = Connection(socket, name=f"trainer rank {rank}")
        return cls(name, connection, rank, ranks, dtype, options, timeout_s, names or SameNames())

    # Declaring

    @property
    def catalog(self) -> Catalog:
        """The stage's catalog. Raises OutOfOrder before ``declare``."""
        if self._segment is None:
            raise self._not_ready()
        return self._segment.catalog

    @property
    def newest_sealed(self) -> int | None:
        """The newest version that this rank knows to be sealed: versions go on from there."""
        return self._newest

    def declare(
        self,
        tensors: nn.Module | Iterable[nn.Module] | Mapping[str, Shards],
        *,
        keep_dtype: Iterable[str] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> Catalog:
        """Say what this rank holds; returns once all ranks have.

        Args:
            tensors: a module, the parts of a model, or tensors by name: DTensors, plain tensors that are whole, or
                LocalShards, several where a rank holds several boxes of one tensor.
            keep_dtype: names of tensors that are staged in their own dtype whatever the stage's is.
            aliases: further names of the stage's tensors, each with the name that it stands for: readers may use
                either, and the tensor is staged once. Those of tied parameters are found without being given.

        Raises:
            WrongDtype, WrongShape, BoxOutside, BoxDoubled, BoxMissing, CatalogMismatch: what does not fit.
            UnknownTensor: there is no name for a tensor, or an alias stands for one that no rank declares.
            NotEnoughMemory: there is no room for two versions.
            DeadlineExceeded: some ranks have not declared in time; the message names them.
        """
        if self._segment is not None:
            raise OutOfOrder(f"stage {self.name!r} is declared already", remedy="declare once, then begin versions")
        also = {**self._names.aliases(), **(aliases or {})}
        if not isinstance(tensors, Mapping):
            self._modules = Modules(tensors)
            keep_dtype = {*keep_dtype, *self._modules.buffers}
            if isinstance(self._names, SameNames):
                also = self._modules.tied | also
            tensors = dict(self._modules.tensors())
        holdings = self._holdings = Holdings(self.rank, self._names, tensors)
        request = wire.Declare(
            stage=self.name,
            rank=self.rank,
            ranks=self.ranks,
            options=self._options,
            tensors=holdings.declarations(self._dtype, frozenset(keep_dtype)),
            aliases=tuple(Alias(alias=alias, name=name) for alias, name in also.items()),
            timeout_s=self.timeout_s,
        )
        answer = self._connection.request(request, wire.Declared, timeout_s=self.timeout_s)
        self._adopt(answer)
        self._ready().flushers.prepare(list(self._places(tensors)))
        return self.catalog

    def _adopt(self, answer: wire.Declared) -> None:
        self._segment = segment.open_existing(answer.segment, writable=True)
        self._newest = answer.newest
        for owned in self.catalog.owned_by(self.rank):
            self._owned.setdefault(self.catalog.tensors[owned.tensor].name, []).append(owned)
            self._boxes_owned += 1
        self._flushers = Flushers(self._segment, self._owned, self.rank, self._open_device)

    def _places(self, tensors: Mapping[str, Shards]) -> Iterator[Put]:
        for name, shards in tensors.items():
            for shard in shards if isinstance(shards, Sequence) else (shards,):
                put = self._ready().holdings.place(self.catalog, name, shard)
                if put is not None:
                    yield put

    # One version

    def begin(self, version: int) -> None:
        """Start a version. Returns at once: the slot is waited for in the background.

        Raises:
            VersionNotRising: this rank knows of a sealed version that is not older.
            OutOfOrder: the stage is not declared, or the version before is not committed.
            StagingError: what went wrong with the version before, if nobody has seen it yet.
        """
        self._ready()
        if self._current is not None:
            raise OutOfOrder(
                f"version {version} begins while version {self._current.version} is not committed",
                remedy="commit or abort it first",
                version=version,
            )
        if self._last is not None:
            self._last.raise_if_failed()
        if self._newest is not None and version <= self._newest:
            raise VersionNotRising(
                f"rank {self.rank} begins version {version}, but version {self._newest} is sealed",
                remedy=f"use a version greater than {self._newest}",
                version=version,
                rank=self.rank,
            )
        # A slot, own moments, those of all ranks, the copies, all commits: each may take its time, one after the other.
        waits = 3 if self.catalog.format is None else 5
        deadline_s = waits * (self.timeout_s + ANSWER_S)
        self._current = Publication(version, deadline_s, self._background.submit(self._request_slot, version))

    def _request_slot(self, version: int) -> int:
        if self._in_doubt is not None:
            self._send_abort(self._in_doubt, f"rank {self.rank} does not know what became of it")
        request = wire.Begin(stage=self.name, rank=self.rank, version=version, timeout_s=self.timeout_s)
        begun = self._ask(request, wire.Begun)
        self._ready().flushers.begin(begun.slot, begun.attempt)
        return begun.slot

    def _ask(self, request: wire.Begin | wire.Measure | wire.Commit, answer: type[Expected]) -> Expected:
        """Where the daemon does not answer, it may have begun the version, or not: it is given up before the next."""
        try:
            return self._connection.request(request, answer, timeout_s=self.timeout_s)
        except DaemonUnreachable:
            self._in_doubt = request.version
            raise

    def put(
        self,
        name: str,
        shard: torch.Tensor | LocalShard,
        *,
        global_shape: tuple[int, ...] | None = None,
        offset: tuple[int, ...] | None = None,
    ) -> None:
        """Stage a shard. Returns at once: do not change the tensor before ``fence``.

        Args:
            name: the tensor's name.
            shard: a DTensor; a plain tensor that is whole; or a part, with ``global_shape`` and ``offset``.
            global_shape, offset: of a plain tensor that is a part.

        Raises:
            OutOfOrder: no version is begun, or this shard has been put already.
            UnknownTensor, WrongDtype, WrongShape, BoxOutside: it is not what was declared.
        """
        publication = self._begun(f"put of tensor {name!r}")
        if isinstance(shard, torch.Tensor) and (global_shape is not None or offset is not None):
            shard = LocalShard(shard, global_shape, offset)
        self._put(publication, ((name, shard),))
        batch = publication._batch
        if batch.bytes >= BATCH_BYTES and batch.age_s >= max(BATCH_S, PUT_S * len(batch.puts)):
            self._flush(publication)

    def _put(self, publication: Publication, shards: Iterable[tuple[str, torch.Tensor | LocalShard]]) -> None:
        """Take shards up. This is what the trainer pays for: a few microseconds a shard."""
        ready, catalog, batch = self._ready(), self.catalog, publication._batch
        devices = set()
        for name, shard in shards:
            put = ready.holdings.place(catalog, name, shard)
            if put is None:
                continue
            if put.holding.number in publication._put:
                raise OutOfOrder(
                    f"box {put.holding.box} of tensor {name!r} is put twice for version {publication.version}",
                    remedy="put every shard once per version",
                    tensor=name,
                    box=put.holding.box,
                    version=publication.version,
                )
            publication._put.add(put.holding.number)
            batch.add(put)
            devices.add(put.shard.device)
        batch.queues.update(ready.flushers.current(devices))

    def _flush(self, publication: Publication) -> None:
        """Queue what has been put so far for the background thread."""
        batch, publication._batch = publication._batch, Batch()
        if batch.puts:
            publication._kept.append(batch)
            publication._flushed.append(self._background.submit(self._flush_batch, publication, batch, batch.marks()))

    def _flush_batch(self, publication: Publication, batch: Batch, marks: list[Mark]) -> list[flushers.Read]:
        slot = publication._slot.result(0)  # queued before: done; raises what the begin raised
        return self._ready().flushers.flush(slot, batch.puts, marks)

    def commit(self) -> Publication:
        """This rank has put everything. Returns at once; the version is sealed when all ranks have committed.

        Raises:
            OutOfOrder: no version is begun.
            CommitIncomplete: a shard that this rank declared has not been put; the message names it.
        """
        publication = self._begun("commit")
        self._ready().holdings.check_complete(publication.version, publication._put)
        self._flush(publication)
        if self.catalog.format is not None:
            measuring = tuple(publication._flushed)
            publication._flushed.append(self._background.submit(self._quantize, publication, measuring))
        publication._sealed = self._background.submit(self._commit, publication)
        self._current, self._last = None, publication
        return publication

    def _quantize(
        self, publication: Publication, measuring: Sequence[Future[list[flushers.Read]]]
    ) -> list[flushers.Read]:
        """Once all ranks have stored their moments, and so the scales are known."""
        slot = publication._slot.result(0)
        for measured in measuring:
            measured.result(0)
        ready = self._ready()
        ready.flushers.finish_measuring(self.timeout_s)
        request = wire.Measure(stage=self.name, rank=self.rank, version=publication.version, timeout_s=self.timeout_s)
        self._ask(request, wire.Measured)
        return ready.flushers.quantize(slot, [put for batch in publication._kept for put in batch.puts])

    def _commit(self, publication: Publication) -> None:
        publication._slot.result(0)
        try:
            for flushed in publication._flushed:
                flushed.result(0)
            self._ready().flushers.finish(self.timeout_s)
        except Exception as failed:
            # Whatever it was: the other ranks must not wait for this one.
            try:
                self._give_up(publication, f"rank {self.rank} could not copy: {failed}")
            except Exception as also:  # noqa: BLE001 - such as of the same device: the first is what went wrong
                failed.add_note(f"to give the version up failed, too: {also}")
            raise
        publication._kept.clear()
        request = wire.Commit(
            stage=self.name,
            rank=self.rank,
            version=publication.version,
            boxes=self._boxes_owned,
            timeout_s=self.timeout_s,
        )
        self._ask(request, wire.Sealed)
        self._newest = publication.version

    def abort(self, reason: str = "the trainer gave it up") -> None:
        """Give up the version that is being filled, on all ranks. Does nothing when there is none."""
        if self._current is None:
            return
        publication, self._current = self._current, None
        self._background.submit(self._give_up, publication, reason).result(3 * (self.timeout_s + ANSWER_S))

    def _give_up(self, publication: Publication, reason: str) -> None:
        try:
            # Nothing of it may still be on its way when the slot becomes another version's.
            self._ready().flushers.abandon(self.timeout_s)
        finally:
            publication._kept.clear()
            self._send_abort(publication.version, reason)

    def _send_abort(self, version: int, reason: str) -> None:
        request = wire.Abort(stage=self.name, rank=self.rank, version=version, reason=reason[:2000])
        self._in_doubt = version
        self._connection.request(request, wire.Done)
        self._in_doubt = None

    def fence(self) -> None:
        """Afterwards the shards put so far may be changed: what a device computes from now on waits for its copies.

        The host waits for shards in its own memory, and where the slot to write is not free yet; not for a device.
        Where trainers quantize, it waits until all ranks have stored their moments too.

        Raises:
            StagingError: why the version that they belong to has failed.
            OutOfOrder: the trainers quantize, and the version is not committed.
        """
        if self._current is not None and self.catalog.format is not None and self._current._put:
            raise OutOfOrder(
                f"fence before version {self._current.version} is committed: its scales follow from all that is put",
                remedy="commit, then call fence",
                version=self._current.version,
            )
        if self._current is not None:
            self._flush(self._current)
        for publication in (self._last, self._current):
            if publication is not None:
                publication.raise_if_failed()
                if not publication.done:
                    publication.fence()

    def fence_before(self, optimizer: torch.optim.Optimizer) -> None:
        """Call ``fence`` before every step of an optimizer, by its step pre-hook."""
        optimizer.register_step_pre_hook(lambda *_: self.fence())

    def publish(self, version: int, modules: nn.Module | Iterable[nn.Module]) -> Publication:
        """Declare (the first time), begin, put every tensor of a model or of its parts, commit: in one line."""
        if self._segment is None:
            self.declare(modules)
        found = self._modules
        if found is None or not found.are(modules):
            found = self._modules = Modules(modules)
        self.begin(version)
        try:
            self._put(self._begun("put"), found.tensors())
            return self.commit()
        except Exception as failed:
            self.abort(f"rank {self.rank} could not publish it: {failed}")
            raise

    # The end

    def close(self) -> None:
        """Finish what is committed, give up what is not, and let the daemon go. May be called twice.

        Raises:
            StagingError: what went wrong with the last version, if nobody has seen it yet.
        """
        self._leave()
        if self._last is not None:
            self._last.raise_if_failed()

    def _leave(self) -> None:
        self._background.shutdown(wait=True)
        flushing, self._flushers = self._flushers, None
        try:
            if flushing is not None:  # what was begun and never committed must not be on its way to another's slot
                flushing.abandon(self.timeout_s)
        finally:
            self._connection.close()
        if flushing is not None:  # where copies do not end, what they read and write stays as it is
            flushing.close()
        if self._segment is not None:
            self._segment.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._leave()  # the error that ends the block is the one to be seen

    def _begun(self, what: str) -> Publication:
        self._ready()
        if self._current is None:
            raise OutOfOrder(f"{what} before begin", remedy="begin a version first", stage=self.name)
        return self._current

    def _ready(self) -> _Ready:
        if self._flushers is None or self._holdings is None:
            raise self._not_ready()
        return _Ready(self._flushers, self._holdings)

    def _not_ready(self) -> OutOfOrder:
        return OutOfOrder(
            f"stage {self.name!r} is not declared, or closed", remedy="call declare first", stage=self.name
        )


@dataclass(frozen=True)
class _Ready:
    """What exists once the stage is declared."""

    flushers: Flushers
    holdings: Holdings
