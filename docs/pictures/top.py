# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Makes top.svg: what ``stagingd top`` shows of a real run, on the machine that this is started on.

    PYTHONPATH=client:vllm_ext:. python docs/pictures/top.py

A daemon serves two stages, "policy" with four trainer ranks and "reference" with one. An engine of two ranks reads
the first, copies what it reads into memory of its own, and reports how long that took, as a vLLM worker does. The
picture is taken while two of four ranks have committed a version and the engine still reads the one before.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from stagingd_client import LocalShard, Stage
from stagingd_vllm import Reader
from stagingd_vllm.reporter import Reporter

from stagingd.boxes import Box
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable
from stagingd.screen import FittedScreen
from stagingd.seen import SHOWN_VERSIONS, look

PICTURE = Path(__file__).with_suffix(".svg")
TRAINERS, READERS, LAYERS, VERSIONS = 4, 2, 12, 6
SHAPE = (1024, 1024)
STEP_S = 1.5
"""An optimizer step, which nothing here stands in for but its time."""

DEADLINE_S = 30.0
WIDTH, HEIGHT = 100, 24


def shard(rank: int, ranks: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """A rank's rows of every layer, and where they begin."""
    rows = SHAPE[0] // ranks
    return torch.randn(rows, SHAPE[1]), (rank * rows, 0)


def declare(stage: Stage) -> None:
    rows, offset = shard(stage.rank, stage.ranks)
    stage.declare({f"layers.{layer}.weight": LocalShard(rows, SHAPE, offset) for layer in range(LAYERS)})


def fill(stage: Stage, version: int) -> None:
    rows, offset = shard(stage.rank, stage.ranks)
    stage.begin(version)
    for layer in range(LAYERS):
        stage.put(f"layers.{layer}.weight", rows, global_shape=SHAPE, offset=offset)


def publish(stage: Stage, version: int) -> None:
    fill(stage, version)
    stage.commit().wait()


def update(reader: Reader, reporter: Reporter, live: dict[str, torch.Tensor]) -> None:
    """Half of the rows of every layer, into memory of the rank's own."""
    rows = SHAPE[0] // READERS
    with reader.lease() as lease:
        started = time.perf_counter()
        for name, weight in live.items():
            weight.copy_(lease.read(name, Box((reader.rank * rows, 0), (rows, SHAPE[1]))))
        seconds = time.perf_counter() - started
    reporter.tell("updated", lease.version, lease.bytes_read, seconds)


def until(holds: Callable[[], bool], what: str) -> None:
    """Look until it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {DEADLINE_S:g} s: {what}")
        time.sleep(0.02)


def serve(folder: Path, undo: ExitStack) -> Path:
    """A daemon of its own; returns its socket."""
    prefix = f"/stagingd-picture-{uuid.uuid4().hex[:12]}-"
    command = [sys.executable, "-m", "stagingd", "serve", "--runtime-dir", str(folder), "--segment-prefix", prefix]
    process = subprocess.Popen([*command, "--no-lock-memory"], stderr=subprocess.DEVNULL)
    undo.callback(process.wait, DEADLINE_S)
    undo.callback(process.terminate)

    def answers() -> bool:
        try:
            Connection(folder / "control.sock", name="picture").close()
        except DaemonUnreachable:
            return False
        return True

    until(answers, "the daemon to serve")
    return folder / "control.sock"


def picture(connection: Connection) -> None:
    console = Console(file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT, force_terminal=True)
    console.print(FittedScreen(look(connection, last=SHOWN_VERSIONS)))
    PICTURE.write_text(console.export_svg(title="stagingd top") + "\n")


def run(socket: Path, undo: ExitStack) -> None:
    threads = undo.enter_context(ThreadPoolExecutor(TRAINERS + READERS))
    ranks = [
        undo.enter_context(Stage.open("policy", rank=rank, ranks=TRAINERS, socket=socket)) for rank in range(TRAINERS)
    ]
    other = undo.enter_context(Stage.open("reference", rank=0, ranks=1, socket=socket))
    list(threads.map(declare, [*ranks, other]))
    publish(other, 1)
    readers = [
        undo.enter_context(Reader.attach("policy", engine="rollout-0", rank=rank, ranks=READERS, socket=socket))
        for rank in range(READERS)
    ]
    reporters = [Reporter("policy", "rollout-0", rank, socket) for rank in range(READERS)]
    for reporter in reporters:
        undo.callback(reporter.close)
    names = [tensor.name for tensor in readers[0].catalog.tensors]
    lives = [
        {name: torch.empty(SHAPE[0] // READERS, SHAPE[1], dtype=torch.bfloat16) for name in names} for _ in readers
    ]
    for version in range(1, VERSIONS + 1):
        list(threads.map(publish, ranks, [version] * TRAINERS))
        list(threads.map(update, readers, reporters, lives))
        time.sleep(STEP_S)
    connection = undo.enter_context(Connection(socket, name="picture"))
    with ExitStack() as leases:
        for lease in threads.map(Reader.lease, readers):
            leases.enter_context(lease)
        list(threads.map(fill, ranks, [VERSIONS + 1] * TRAINERS))
        pending = [stage.commit() for stage in ranks[:2]]

        def two_have_committed() -> bool:
            slots = look(connection, last=1, stage="policy").report.stages[0].slots
            return [(len(s.begun_ranks), len(s.committed_ranks)) for s in slots if s.state == "filling"] == [(4, 2)]

        until(two_have_committed, "two ranks to commit")
        time.sleep(0.5)  # for ages that are not zero
        picture(connection)
    for publication in [*pending, *(stage.commit() for stage in ranks[2:])]:
        publication.wait()


def main() -> None:
    """Make the picture."""
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        run(serve(folder, undo), undo)


if __name__ == "__main__":
    main()
