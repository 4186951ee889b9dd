# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""``stagingd demo``: daemon, trainers and engine as processes of their own, and a verdict on all of it.

The trainers and the engine bring torch and vLLM; this module only starts them as commands, watches
them and reads what they report.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DeadlineExceeded, StagingError
from stagingd.record import Record
from stagingd.segment import SHARED_MEMORY

STAGE = "policy"
DEADLINE_S = 240.0
"""The whole demo's; its parts have their own below it."""


class DemoFailed(StagingError):
    """A part of the demo is missing or ended before its time."""

    code = "demo_failed"


class Outcome(Record):
    """The verdict. ``ok`` is true only if every check holds; ``failed`` names those that do not."""

    ok: bool
    failed: tuple[str, ...]
    versions: int
    version_numbers: tuple[int, ...]
    tensors: int
    bytes_per_version: int
    tensor_parallel: int
    trainers: int
    engine: str
    tokens_match: bool
    fp8_bit_exact: bool
    bytes_read_per_rank: tuple[int, ...]
    trainer_blocked_ms_p50: float
    update_ms_p50: float
    optimizer_steps: int
    begins_kept_waiting: int
    seconds: float


def run(*, versions: int, trainers: int, console: Console) -> Outcome:
    """Run the demo.

    Args:
        versions: how many versions to publish, read and check.
        trainers: how many FSDP2 ranks train.
        console: where progress and the table go.

    Raises:
        DemoFailed: a part is not installed or has ended; the message holds the end of its log.
        DeadlineExceeded: it took too long.
    """
    for module in ("torch", "transformers", "vllm"):
        if importlib.util.find_spec(module) is None:
            raise DemoFailed(f"the demo needs {module}", remedy="install stagingd[client,vllm]")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stagingd-demo-") as name, ExitStack() as cleanup:
        play = Play(Path(name), started + DEADLINE_S, versions, trainers)
        cleanup.enter_context(play.processes())
        with progress_bar(console) as bar:
            rows = play.follow(bar)
            after_lease = play.publish_beside_a_slow_reader()
            status = play.status()
            play.stop()
        outcome = judge(play, rows, after_lease, status, time.monotonic() - started)
    console.print(table(rows))
    console.print(
        "[green]every check holds[/green]" if outcome.ok else f"[red]failed: {', '.join(outcome.failed)}[/red]"
    )
    return outcome


class Play:
    """The processes of one demo and the folder that they share."""

    def __init__(self, folder: Path, deadline: float, versions: int, trainers: int) -> None:
        self.folder = folder
        self.versions = versions
        self.trainers = trainers
        self.socket = folder / "run" / "control.sock"
        self._deadline = deadline
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @contextmanager
    def processes(self) -> Iterator[None]:
        """Start everything; whatever happens, nothing is left running."""
        try:
            self._start("daemon", "stagingd", *self._daemon_options())
            self._wait("the daemon's socket", self.socket.exists)
            for rank in range(self.trainers):
                ranks = ("--rank", str(rank), "--ranks", str(self.trainers))
                self._start(f"trainer-{rank}", "stagingd_client.demo", *self._common(), *ranks)
            self._start("engine", "stagingd_vllm.demo", *self._common(), "--versions", str(self.versions))
            yield
        finally:
            for process in self._running.values():
                process.terminate()
            for process in self._running.values():
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)

    def _daemon_options(self) -> tuple[str, ...]:
        # The demo's two slots are a few megabytes: locking them would only ask for a limit to be raised.
        prefix = f"/stagingd-demo-{os.getpid()}-"
        return ("serve", "--runtime-dir", str(self.socket.parent), "--segment-prefix", prefix, "--no-lock-memory")

    def _common(self) -> tuple[str, ...]:
        return ("--folder", str(self.folder), "--socket", str(self.socket), "--stage", STAGE)

    def _start(self, name: str, module: str, *arguments: str) -> None:
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_RPC_BASE_PATH": str(self.folder),  # the engine's own sockets go when the demo goes
        }
        with self._log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=log, stderr=log, env=environment
            )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        """Wait until ``done()``, as long as every process lives and the deadline has not passed."""
        while not done():
            for name, process in self._running.items():
                if process.poll() not in (None, 0):
                    raise DemoFailed(
                        f"{name} ended with status {process.returncode}:\n{self._tail(name)}",
                        remedy="its log's end is above",
                    )
            if time.monotonic() > self._deadline:
                tails = "\n".join(f"{name}:\n{self._tail(name)}" for name in self._running)
                raise DeadlineExceeded(
                    f"the demo waited too long for {what}\n{tails}", remedy="run it on a machine with two free cores"
                )
            time.sleep(0.05)

    def _tail(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-25:])

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What a process has reported so far: one JSON object a line."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def follow(self, bar: Progress) -> list[dict[str, Any]]:
        """Show how far the engine is, until it has checked every version."""
        task = bar.add_task("training starts, the engine loads", total=self.versions)

        def done() -> bool:
            rows = self.rows("engine")
            if rows:
                bar.update(task, completed=len(rows), description=f"version {rows[-1]['version']} checked")
            return (self.folder / "engine.json").exists()

        self._wait("the engine to check every version", done)
        return self.rows("engine")

    def publish_beside_a_slow_reader(self) -> int:
        """Hold a version as an engine that is slow to read, and let the trainers publish the next one."""
        with Connection(self.socket, name="a slow reader") as connection:
            connection.request(
                wire.Attach(stage=STAGE, engine="slow", rank=0, ranks=1, timeout_s=10.0), wire.Attached, timeout_s=10.0
            )
            lease = wire.LeaseVersion(stage=STAGE, engine="slow", rank=0, timeout_s=10.0)
            held = connection.request(lease, wire.Leased, timeout_s=10.0)
            (self.folder / "wanted.part").write_text(str(self.versions + 1))
            (self.folder / "wanted.part").rename(self.folder / "wanted")  # never seen empty
            self._wait(
                "the trainers to publish beside a slow reader", lambda: len(self.rows("trainer-0")) > self.versions
            )
            connection.request(wire.Release(stage=STAGE, lease=held.lease, rank=0), wire.Done)
        return held.version

    def status(self) -> wire.StageStatus:
        """What the daemon says of the stage."""
        with Connection(self.socket, name="demo") as connection:
            (stage,) = connection.request(wire.Status(), wire.StatusReport).stages
        return stage

    def stop(self) -> None:
        """Let the trainers end, then the daemon."""
        (self.folder / "stop").touch()
        ending = [process for name, process in self._running.items() if name != "daemon"]
        self._wait("trainers and engine to end", lambda: all(process.poll() is not None for process in ending))
        self._running["daemon"].terminate()
        self._wait("the daemon to end", lambda: self._running["daemon"].poll() is not None)


def judge(play: Play, rows: list[dict[str, Any]], held: int, status: wire.StageStatus, seconds: float) -> Outcome:
    """Every check of the demo, by name."""
    engine = json.loads((play.folder / "engine.json").read_text())
    trained = [play.rows(f"trainer-{rank}") for rank in range(play.trainers)]
    blocked = [row["publish_ms"] + row["fence_ms"] for rank in trained for row in rank]
    stage_bytes = engine["ranks"][0]["bytes_of_stage"]
    checks = {
        "every wanted version was read": len(rows) == play.versions,
        "every rank read the same version": all(row["same_version_on_all_ranks"] for row in rows),
        "versions rise": all(a["version"] < b["version"] for a, b in itertools.pairwise(rows)),
        "tokens and log-probabilities match": all(row["tokens_match"] for row in rows),
        "every version differs from the one before": all(row["differs_from_before"] for row in rows),
        "fp8 is bit-exact for all grids": all(all(row["fp8_bit_exact"].values()) for row in rows),
        "every rank read only its slice": planned_reads(rows, engine["ranks"], stage_bytes),
        "the trainer never waited for the engine": status.begins_kept_waiting == 0,
        "a version was published while an older one was being read": trained[0][-1]["version"] > held,
        "no shared memory is left": not (SHARED_MEMORY / status.segment.lstrip("/")).exists(),
    }
    failed = tuple(name for name, holds in checks.items() if not holds)
    return Outcome(
        ok=not failed,
        failed=failed,
        versions=len(rows),
        version_numbers=tuple(row["version"] for row in rows),
        tensors=status.tensors,
        bytes_per_version=stage_bytes,
        tensor_parallel=len(engine["ranks"]),
        trainers=play.trainers,
        engine=f"vLLM {engine['vllm']}",
        tokens_match=all(row["tokens_match"] for row in rows),
        fp8_bit_exact=all(all(row["fp8_bit_exact"].values()) for row in rows),
        bytes_read_per_rank=tuple(rows[-1]["bytes_read_per_rank"]) if rows else (),
        trainer_blocked_ms_p50=statistics.median(blocked),
        update_ms_p50=statistics.median(row["update_ms"] for row in rows),
        optimizer_steps=max(row["step"] for row in trained[0]),
        begins_kept_waiting=status.begins_kept_waiting,
        seconds=seconds,
    )


def planned_reads(rows: list[dict[str, Any]], ranks: list[dict[str, Any]], stage_bytes: int) -> bool:
    """Whether every rank read what its plan says and nothing else: its share, and a little that all ranks hold."""
    planned = [rank["bytes_per_update"] for rank in ranks]
    share = 1.1 * stage_bytes / len(ranks)
    return max(planned) < share and all(row["bytes_read_per_rank"] == planned for row in rows)


def progress_bar(console: Console) -> Progress:
    """The bar of a run."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


def table(rows: list[dict[str, Any]]) -> Table:
    """What was found per version."""
    found = Table(title="versions taken by the engine", title_justify="left")
    for column in ("version", "tokens and log-probabilities", "FP8 of slices", "read per rank", "update"):
        found.add_column(column)
    for row in rows:
        read = " / ".join(f"{size / 2**20:.2f} MiB" for size in row["bytes_read_per_rank"])
        exact = "bit-exact" if all(row["fp8_bit_exact"].values()) else "differs"
        match = "bit-equal" if row["tokens_match"] else "differ"
        found.add_row(str(row["version"]), match, exact, read, f"{row['update_ms']:.2f} ms")
    return found
