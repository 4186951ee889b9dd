# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Models of random weights that stand staged, for engines to read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from stagingd_client import Stage

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
    """A version, and when its last tensor had been put and when it was sealed, by ``time.monotonic``."""

    version: int
    put: float
    sealed: float


class Trainer:
    """A process that stages versions of random weights; ``newest`` is the last of them."""

    def __init__(self, model: str, socket: Path, stage_format: StageFormat | None) -> None:
        self._model = model
        self._told, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=train, args=(model, socket, stage_format, theirs))
        self._process.start()
        theirs.close()
        self.newest = 0

    def publish(self) -> Published:
        """Have it stage one more version. Raises BenchmarkFailed."""
        with suppress(EOFError, ConnectionError):  # it has ended
            self._told.send(None)
            if self._told.poll(TRAINER_S):
                made: Published = self._told.recv()
                self.newest = made.version
                return made
        raise BenchmarkFailed(f"the trainer of {self._model} did not stage it", remedy="its own words are above")

    def end(self) -> None:
        """Let it end."""
        self._told.close()
        self._process.join(ENDING_S)
        end(self._process)


@contextmanager
def served(stage_format: StageFormat | None = None) -> Iterator[Staged]:
    """A daemon; at the end all that was staged is removed."""
    prefix = f"/stagingd-bench-{os.getpid()}-"
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        yield Staged(cleanup.enter_context(daemon(folder, prefix)), folder, stage_format)


@contextmanager
def staging(model: str, stages: Staged) -> Iterator[Trainer]:
    """A model's configuration, two versions, and their trainer, which holds memory on the last GPU until the end.

    Raises:
        BenchmarkFailed: there is no such model, or the trainer did not stage it.
    """
    if model not in SIZES:
        raise BenchmarkFailed(f"there is no model {model!r}", remedy=f"use one of {', '.join(SIZES)}")
    SIZES[model].save_config(stages.folder / model)
    trainer = Trainer(model, stages.socket, stages.stage_format)
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


def train(model: str, socket: Path, stage_format: StageFormat | None, orders: Connection) -> None:
    """One rank: stages a version of random weights for each order, and tells of it, until the orders end."""
    device = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
    tensors = dict(SIZES[model].tensors(1, device))
    made = quantization(stage_format, tensors, "cuda" if torch.cuda.is_available() else "cpu")
    with (
        Stage.open(model, rank=0, ranks=1, socket=socket, quantization=made, timeout_s=TRAINER_S) as stage,
        orders,
        suppress(EOFError),  # whoever measures has ended
    ):
        stage.declare(tensors)
        for version in itertools.count(1):
            orders.recv()
            orders.send(_staged(stage, tensors, version, SIZES[model].tensors(version, device)))


def _staged(
    stage: Stage, tensors: Mapping[str, torch.Tensor], version: int, weights: Iterable[tuple[str, torch.Tensor]]
) -> Published:
    for name, values in weights:
        tensors[name].copy_(values)
    stage.begin(version)
    for name, tensor in tensors.items():
        stage.put(name, tensor)
    put = time.monotonic()
    publication = stage.commit()
    stage.fence()
    publication.wait()
    return Published(version, put, time.monotonic())
