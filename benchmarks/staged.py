# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Models of random weights that stand staged, for engines to read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from stagingd_client import Stage

from benchmarks.host import daemon, end, remove_segments
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES

TRAINER_S = 300.0
"""The longest that staging a version may take, in seconds."""
FIRST_VERSIONS = (1, 2)


@dataclass(frozen=True)
class Staged:
    """Where a daemon listens, and a folder in which each model's configuration has a folder of the model's name."""

    socket: Path
    folder: Path


@dataclass(frozen=True)
class Published:
    """A version, and when its last tensor had been put and when it was sealed, by ``time.monotonic``."""

    version: int
    put: float
    sealed: float


class Trainer:
    """A process that stages two versions of random weights, and then more when it is asked.

    Raises:
        BenchmarkFailed: it did not stage them.
    """

    def __init__(self, model: str, socket: Path) -> None:
        self._model = model
        self._told, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=train, args=(model, socket, theirs))
        self._process.start()
        theirs.close()
        self.newest = [self._published().version for _ in FIRST_VERSIONS][-1]

    def publish(self) -> Published:
        """Stage one more version. Raises BenchmarkFailed."""
        self._told.send(None)
        made = self._published()
        self.newest = made.version
        return made

    def end(self) -> None:
        """Let it end. May be called twice."""
        self._told.close()
        self._process.join(TRAINER_S)
        end(self._process)

    def _published(self) -> Published:
        try:
            if self._told.poll(TRAINER_S):
                made: Published = self._told.recv()
                return made
        except EOFError:
            pass  # it has ended
        raise BenchmarkFailed(f"the trainer of {self._model} did not stage it", remedy="its own words are above")


@contextmanager
def served() -> Iterator[Staged]:
    """A daemon; at the end all that was staged is removed."""
    prefix = f"/stagingd-bench-{os.getpid()}-"
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        yield Staged(cleanup.enter_context(daemon(folder, prefix)), folder)


@contextmanager
def staging(model: str, stages: Staged) -> Iterator[Trainer]:
    """A model's configuration, and its trainer, which holds memory on the last GPU until the end."""
    SIZES[model].save_config(stages.folder / model)
    trainer = Trainer(model, stages.socket)
    try:
        yield trainer
    finally:
        trainer.end()


@contextmanager
def staged(models: Sequence[str]) -> Iterator[Staged]:
    """Two versions of each model under the model's name, by trainers that have ended.

    Args:
        models: keys of ``SIZES``.

    Raises:
        BenchmarkFailed: a trainer did not stage its model.
    """
    with served() as stages:
        for model in models:
            with staging(model, stages):
                pass
        yield stages


def train(model: str, socket: Path, orders: Connection) -> None:
    """One rank: stages two versions of random weights, and one more for each order, and tells of each."""
    device = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
    tensors = dict(SIZES[model].tensors(1, device))
    with Stage.open(model, rank=0, ranks=1, socket=socket, timeout_s=TRAINER_S) as stage, orders:
        stage.declare(tensors)
        for version in itertools.count(1):
            if version not in FIRST_VERSIONS and not _ordered(orders):
                return
            for name, values in SIZES[model].tensors(version, device):
                tensors[name].copy_(values)
            stage.begin(version)
            for name, tensor in tensors.items():
                stage.put(name, tensor)
            put = time.monotonic()
            publication = stage.commit()
            stage.fence()
            publication.wait()
            orders.send(Published(version, put, time.monotonic()))


def _ordered(orders: Connection) -> bool:
    try:
        orders.recv()
    except EOFError:
        return False  # whoever measures has ended
    return True
