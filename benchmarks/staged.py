# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Models of random weights that stand staged, for engines to read."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from stagingd_client import Stage

from benchmarks.host import daemon, end, remove_segments
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES

TRAINER_S = 300.0
"""The longest that staging two versions may take, in seconds."""


@dataclass(frozen=True)
class Staged:
    """Where a daemon listens, and a folder in which each model's configuration has a folder of the model's name."""

    socket: Path
    folder: Path


@contextmanager
def staged(models: Sequence[str]) -> Iterator[Staged]:
    """Two versions of each model under the model's name, by a trainer that has ended; at the end all of it is removed.

    Args:
        models: keys of ``SIZES``.

    Raises:
        BenchmarkFailed: a trainer did not stage its model.
    """
    prefix = f"/stagingd-bench-{os.getpid()}-"
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        socket = cleanup.enter_context(daemon(folder, prefix))
        for model in models:
            SIZES[model].save_config(folder / model)
            trainer = multiprocessing.get_context("spawn").Process(target=train, args=(model, socket))
            trainer.start()
            cleanup.callback(end, trainer)
            trainer.join(TRAINER_S)
            if trainer.exitcode != 0:
                raise BenchmarkFailed(f"the trainer of {model} did not stage it", remedy="its own words are above")
        yield Staged(socket, folder)


def train(model: str, socket: Path) -> None:
    """Stage two versions of random weights, from one rank."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = dict(SIZES[model].tensors(1, device))
    with Stage.open(model, rank=0, ranks=1, socket=socket, timeout_s=TRAINER_S) as stage:
        stage.declare(tensors)
        for version in (1, 2):
            for name, values in SIZES[model].tensors(version, device):
                tensors[name].copy_(values)
            stage.begin(version)
            for name, tensor in tensors.items():
                stage.put(name, tensor)
            publication = stage.commit()
            stage.fence()
            publication.wait()
