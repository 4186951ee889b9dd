# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A daemon at work, for pictures: three trainer ranks, and an engine of two ranks that reads and applies every version.

Everything is real but the model and what the engine computes with it: shards are flushed, versions are sealed, leased,
copied and reported. One version holds NaN, and in the end one layer's weights grow.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from stagingd_client import Stage
from stagingd_client.placement import LocalShard
from stagingd_vllm import Lease, Reader
from stagingd_vllm.quantization_error import QuantizationError, layer_errors
from stagingd_vllm.reporter import Reporter
from stagingd_vllm.scales import FP8_MAX

from stagingd.boxes import Box
from stagingd.catalog import StagedTensor
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable, NonFiniteValues, VersionAborted
from stagingd.layers import Layers
from stagingd.moments import Grid

TRAINERS = 3
READERS = 2
HIDDEN = 192
BLOCKS = 12
POISONED = 21
"""The version that holds NaN."""
GROWING = "model.layers.7.mlp.down_proj.weight"
STEP_S = 0.25
DEADLINE_S = 60.0

Weights = dict[str, torch.Tensor]


def model() -> Weights:
    """The weights of a small Llama-shaped model."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.embed_tokens.weight": (1024, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for block in range(BLOCKS):
        name = f"model.layers.{block}."
        shapes |= {f"{name}self_attn.{one}_proj.weight": (HIDDEN, HIDDEN) for one in "qkvo"}
        shapes |= {f"{name}mlp.{one}_proj.weight": (4 * HIDDEN, HIDDEN) for one in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (HIDDEN, 4 * HIDDEN), f"{name}input_layernorm.weight": (HIDDEN,)}
    return {name: torch.randn(shape, generator=generator) / HIDDEN**0.5 for name, shape in shapes.items()}


def step(weights: Weights, version: int, last: int) -> None:
    """What an optimizer would do, in small."""
    generator = torch.Generator().manual_seed(version)
    for tensor in weights.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.004)
    if version >= last - 2:
        weights[GROWING][3, 5] = 2.0 * (version - last + 4)


@dataclass
class Scene:
    """A daemon in a folder of its own, with an HTTP port."""

    folder: Path
    port: int
    stage: str = "policy"

    @property
    def socket(self) -> Path:
        return self.folder / "control.sock"


@contextmanager
def daemon() -> Iterator[Scene]:
    """Start a daemon, and stop it in the end."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as undo:
        prefix = f"/stagingd-picture-{uuid.uuid4().hex[:8]}-"
        command = [sys.executable, "-m", "stagingd", "serve", "--runtime-dir", folder, "--segment-prefix", prefix]
        log_path = Path(folder) / "daemon.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen([*command, "--no-lock-memory", "--http-port", "0"], stderr=log)
        undo.callback(process.wait, DEADLINE_S)
        undo.callback(process.terminate)
        yield Scene(Path(folder), _port(Path(folder)))


def _port(folder: Path) -> int:
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            Connection(folder / "control.sock", name="picture").close()
            break
        except DaemonUnreachable:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
    lines = map(json.loads, (folder / "daemon.log").read_text().splitlines())
    return next(int(line["port"]) for line in lines if line["event"] == "serving_http")


@contextmanager
def play(scene: Scene, versions: int) -> Iterator[None]:
    """Train so many versions. Once the engine has applied all of them, the next one is under way, and everybody there.

    Raises what went wrong in a rank.
    """
    crew = Crew(scene, versions)
    with ThreadPoolExecutor(TRAINERS + READERS + 1) as threads:
        work = [threads.submit(train, crew, rank) for rank in range(TRAINERS)]
        work += [threads.submit(follow, crew, rank) for rank in range(READERS)]
        try:
            wait([*work, threads.submit(crew.applied.wait, DEADLINE_S)], return_when=FIRST_COMPLETED)
            crew.under_way.wait(DEADLINE_S)
            yield
        finally:
            crew.leave.set()
            crew.together.abort()
    for one in work:
        one.result()


class Crew:
    """What the ranks share."""

    def __init__(self, scene: Scene, versions: int) -> None:
        self.scene = scene
        self.versions = versions
        self.weights = model()
        self.together = threading.Barrier(TRAINERS, timeout=DEADLINE_S)
        self.applied = threading.Barrier(READERS + 1, timeout=DEADLINE_S)
        self.under_way = threading.Barrier(TRAINERS + 1, timeout=DEADLINE_S)
        self.leave = threading.Event()


def train(crew: Crew, rank: int) -> None:
    """One trainer rank: it holds some rows of everything."""
    with Stage.open(crew.scene.stage, rank=rank, ranks=TRAINERS, socket=crew.scene.socket) as stage:
        stage.declare(shards(crew.weights, rank))
        for version in range(1, crew.versions + 1):
            if crew.together.wait() == 0:
                step(crew.weights, version, crew.versions)
            crew.together.wait()
            time.sleep(STEP_S * (1 + 0.1 * rank))
            put(stage, version, shards(crew.weights, rank))
            with suppress(NonFiniteValues):  # as is to be seen
                stage.commit().wait()
        put(stage, crew.versions + 1, shards(crew.weights, rank))
        stage.fence()  # begun, and copied
        last = stage.commit() if rank == 0 else None
        crew.under_way.wait()
        crew.leave.wait(DEADLINE_S)
        stage.abort("the picture is taken")
        if last is not None:
            with suppress(VersionAborted):
                last.wait()


def put(stage: Stage, version: int, tensors: dict[str, LocalShard]) -> None:
    """Begin a version, and put everything."""
    stage.begin(version)
    for name, shard in tensors.items():
        poisoned = version == POISONED and stage.rank == 1 and name == GROWING
        values = shard.tensor * float("nan") if poisoned else shard.tensor
        stage.put(name, LocalShard(values, shard.global_shape, shard.offset))


def shards(weights: Weights, rank: int) -> dict[str, LocalShard]:
    """The rows of everything that a rank holds."""
    return {name: rows(tensor, rank) for name, tensor in weights.items()}


def rows(tensor: torch.Tensor, rank: int) -> LocalShard:
    """The rows that a rank holds."""
    count = -(-tensor.shape[0] // TRAINERS)
    first = min(rank * count, tensor.shape[0])
    part = tensor[first : first + count]
    return LocalShard(part, tuple(tensor.shape), (first, *(0 for _ in tensor.shape[1:])))


def follow(crew: Crew, rank: int) -> None:
    """One rank of the engine: it reads its rows of every version, quantizes them beside, and swaps them in."""
    stage, socket = crew.scene.stage, crew.scene.socket
    attached = Reader.attach(stage, engine="rollout", rank=rank, ranks=READERS, socket=socket)
    with attached as reader, closing(Reporter(stage, "rollout", rank, socket)) as reporter:
        layers = Layers.from_tensors([tensor.name for tensor in reader.catalog.tensors])
        live: Weights = {}
        version: int | None = None
        while version != crew.versions:
            with reader.lease(newer_than=version, timeout_s=DEADLINE_S) as lease:
                shadow = {tensor.name: read(lease, tensor, rank) for tensor in reader.catalog.tensors}
            version, started = lease.version, time.perf_counter()
            for name, quantized in shadow.items():
                live.setdefault(name, torch.empty_like(quantized.values)).copy_(quantized.values)
            seconds = time.perf_counter() - started
            reporter.tell("swapped", version, sum(one.nbytes for one in live.values()), seconds)
            errors = layer_errors(layers, ((name, one.error) for name, one in shadow.items() if one.error is not None))
            reporter.tell("examined", version, 0, 0.0, errors)
        crew.applied.wait()
        crew.leave.wait(DEADLINE_S)


@dataclass(frozen=True)
class Quantized:
    """A slice as the engine keeps it, and what that costs; None where it is not quantized."""

    values: torch.Tensor
    error: QuantizationError | None


def read(lease: Lease, tensor: StagedTensor, rank: int) -> Quantized:
    """A rank's rows of a matrix in FP8, by the scale of the whole of it; anything else as it is."""
    if len(tensor.shape) < 2:
        return Quantized(lease.read(tensor.name).clone(), None)
    count = tensor.shape[0] // READERS
    exact = lease.read(tensor.name, Box((rank * count, 0), (count, tensor.shape[1]))).double()
    scale = float(lease.moments(tensor.name, Grid.TENSOR).amax.max()) / FP8_MAX
    quantized = (exact / scale).to(torch.float8_e4m3fn)
    back = quantized.double() * scale
    flushed = int(((back == 0) & (exact != 0)).sum())
    squared_error, squared_values = float((back - exact).square().sum()), float(exact.square().sum())
    return Quantized(quantized, QuantizationError(exact.numel(), 0, flushed, squared_error, squared_values))
