# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Models of random weights that stand staged, for engines to read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from stagingd_client import LocalShard, Stage

from benchmarks.host import ENDING_S, daemon, end, remove_segments
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES
from benchmarks.scale_groups import quantization
from stagingd.formats import StageFormat

TRAINER_S = 300.0
"""The longest that staging a version may take, in seconds."""
VERSIONS = 2


@dataclass(frozen=True)
class Staged:
    """Where a daemon listens, and a folder in which each model's configuration has a folder of the model's name.

    ``stage_format`` is what trainers make of linear layers; None leaves them bf16.
    """

    socket: Path
    folder: Path
    stage_format: StageFormat | None = None

    def label(self, model: str, mode: str, ranks: int) -> str:
        """Of an engine, for the report."""
        label = f"{model}, {mode}, TP {ranks}"
        return label if self.stage_format is None else f"{label}, quantized by the trainer"


@dataclass(frozen=True)
class Published:
    """A version, and when its last tensor had been put and when it was sealed, by ``time.monotonic``.

    ``blocked`` are the seconds for which publishing held a trainer's host; of several ranks, the longest. What a fence
    adds depends on what is computed before it: ``benchmarks.flush`` measures that in steps.
    """

    version: int
    put: float
    sealed: float
    blocked: float

    @classmethod
    def by_all(cls, ranks: Sequence[Published]) -> Published:
        """One version of several ranks."""
        put, sealed, blocked = (max(getattr(one, name) for one in ranks) for name in ("put", "sealed", "blocked"))
        return cls(ranks[0].version, put, sealed, blocked)


class Trainer:
    """Processes that stage versions of random weights, each some rows of all; ``newest`` is the last version."""

    def __init__(self, model: str, socket: Path, stage_format: StageFormat | None, ranks: int) -> None:
        self._model = model
        self._told, self._processes = [], []
        context = multiprocessing.get_context("spawn")
        for rank in range(ranks):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(target=train, args=(model, socket, stage_format, Share(rank, ranks), theirs))
            process.start()
            theirs.close()
            self._told.append(ours)
            self._processes.append(process)
        self.newest = 0

    def publish(self) -> Published:
        """Have them stage one more version, all at once when all of them have its weights. Raises BenchmarkFailed."""
        self._all()
        made = Published.by_all(self._all())
        self.newest = made.version
        return made

    def _all(self) -> list[Published]:
        """Tell them to go on, and wait for what they say."""
        with suppress(EOFError, ConnectionError):  # one has ended
            for told in self._told:
                told.send(None)
            if all(told.poll(TRAINER_S) for told in self._told):
                return [told.recv() for told in self._told]
        raise BenchmarkFailed(f"a trainer of {self._model} did not stage it", remedy="its own words are above")

    def end(self) -> None:
        """Let them end."""
        for told in self._told:
            told.close()
        for process in self._processes:
            process.join(ENDING_S)
            end(process)


@contextmanager
def served(stage_format: StageFormat | None = None) -> Iterator[Staged]:
    """A daemon; at the end all that was staged is removed."""
    prefix = f"/stagingd-bench-{os.getpid()}-"
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        yield Staged(cleanup.enter_context(daemon(folder, prefix)), folder, stage_format)


@contextmanager
def staging(model: str, stages: Staged, ranks: int = 1) -> Iterator[Trainer]:
    """A model's configuration, two versions, and their trainers, which hold memory on the last GPUs until the end.

    Args:
        model: a key of ``SIZES``.
        stages: where.
        ranks: of trainers, each on a GPU of its own where there are as many.

    Raises:
        BenchmarkFailed: there is no such model, or the trainer did not stage it.
    """
    if model not in SIZES:
        raise BenchmarkFailed(f"there is no model {model!r}", remedy=f"use one of {', '.join(SIZES)}")
    SIZES[model].save_config(stages.folder / model)
    trainer = Trainer(model, stages.socket, stages.stage_format, ranks)
    try:
        for _ in range(VERSIONS):
            trainer.publish()
        yield trainer
    finally:
        trainer.end()


@contextmanager
def staged(models: Sequence[str], stage_format: StageFormat | None = None) -> Iterator[Staged]:
    """Two versions of each model under the model's name, by trainers that have ended.

    Args:
        models: keys of ``SIZES``.
        stage_format: what trainers make of linear layers; None leaves them bf16.

    Raises:
        BenchmarkFailed: as ``staging`` says.
    """
    with served(stage_format) as stages:
        for model in models:
            with staging(model, stages):
                pass
        yield stages


@dataclass(frozen=True)
class Share:
    """What a trainer rank holds of each tensor: rows, as FSDP cuts them; the whole where it is alone."""

    rank: int
    ranks: int

    @property
    def device(self) -> str:
        """The last GPUs, one for each rank where there are as many."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{max(count - self.ranks + self.rank, 0)}" if count else "cpu"

    def of(self, values: torch.Tensor) -> LocalShard | None:
        """Its rows, in the precision that FSDP keeps them in where there are several ranks; None where it has none."""
        step = -(-values.shape[0] // self.ranks)
        rows = values[self.rank * step : (self.rank + 1) * step]
        if not len(rows):
            return None
        kept = rows.clone() if self.ranks == 1 else rows.float()
        return LocalShard(kept, tuple(values.shape), (self.rank * step, *(0 for _ in values.shape[1:])))


def train(model: str, socket: Path, stage_format: StageFormat | None, share: Share, orders: Connection) -> None:
    """One rank: for each pair of orders makes weights, and stages them, until the orders end. Tells of both."""
    every = {name: share.of(values) for name, values in SIZES[model].tensors(1, share.device)}
    held = {name: shard for name, shard in every.items() if shard is not None}
    made = quantization(stage_format, every, "cuda" if torch.cuda.is_available() else "cpu")
    options = {"socket": socket, "quantization": made, "timeout_s": TRAINER_S}
    with (
        Stage.open(model, rank=share.rank, ranks=share.ranks, **options) as stage,
        orders,
        suppress(EOFError),  # whoever measures has ended
    ):
        stage.declare(held)
        for version in itertools.count(1):
            orders.recv()
            for name, values in SIZES[model].tensors(version, share.device):
                if (shard := share.of(values)) is not None:
                    held[name].tensor.copy_(shard.tensor)
            if share.device != "cpu":
                torch.cuda.synchronize(share.device)
            orders.send(None)
            orders.recv()
            orders.send(_staged(stage, held, version))


def _staged(stage: Stage, held: Mapping[str, LocalShard], version: int) -> Published:
    begin = time.monotonic()
    stage.begin(version)
    for name, shard in held.items():
        stage.put(name, shard)
    put = time.monotonic()
    publication = stage.commit()
    blocked = time.monotonic() - begin
    stage.fence()
    publication.wait()
    return Published(version, put, time.monotonic(), blocked)
