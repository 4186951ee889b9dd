# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One trainer rank of a comparison, in a process of its own: weights as FSDP cuts them, and whatever sends them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist
from stagingd_client import LocalShard
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.compare.case import Case
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES
from benchmarks.staged import Share

LOCAL = "127.0.0.1"
GROUP_S = 120.0
"""The longest that trainers wait for each other, in seconds."""
ASK_S = 120.0
"""The longest that whoever measures may take to do what a trainer asks, in seconds."""
COPIES = 5
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**24}


class Order(Enum):
    """What a rank is told."""

    PREPARE = "make the weights of the next version"
    SEND = "send them"
    CEILING = "copy to page-locked memory"
    WIRE = "have the system's wire carry as many bytes"
    HOST = "say what of the host's memory the system holds"
    END = "end"


@dataclass(frozen=True)
class Sent:
    """A version is sent, and the rank may change its weights again."""

    blocked_s: float


@dataclass(frozen=True)
class Alone:
    """Seconds of the wire alone; None where this rank has none."""

    seconds: float | None


@dataclass(frozen=True)
class Held:
    """What of the host's memory the system holds in this rank."""

    host_bytes: int


@dataclass(frozen=True)
class Settled:
    """Nothing of a version goes on beside the rank any more; what it took of the rank's device, and of another."""

    device_bytes: int
    elsewhere_bytes: int


@dataclass(frozen=True)
class Copied:
    """A plain copy's bytes a second."""

    bytes_per_s: float


@dataclass(frozen=True)
class Ask:
    """What whoever measures has to do before the rank can go on."""

    what: Any


@dataclass(frozen=True)
class Failed:
    """What ends a rank."""

    words: str


@dataclass(frozen=True)
class Post:
    """Where a rank stands, and what its system needs to know.

    Attributes:
        case: what is compared.
        rank: the rank.
        port: a free one, for the ranks' own group.
        arguments: of the system.
    """

    case: Case
    rank: int
    port: int
    arguments: Mapping[str, Any]


class Sender(Protocol):
    """Sends a rank's weights."""

    def send(self, version: int) -> None:
        """Returns when the weights may change: on the host, or by what the device's stream waits for."""

    def settle(self) -> None:
        """Wait for what goes on beside the trainer."""

    def wire(self) -> float | None:
        """Seconds in which the system's wire carries as many bytes and nothing else; None where there is no such."""

    def host_bytes(self) -> int:
        """Page-locked or shared memory of the system that this rank holds."""


class UsualSender:
    """One that is done when the weights may change, has no wire to measure, and keeps nothing in host memory."""

    def settle(self) -> None:
        """Nothing goes on."""

    def wire(self) -> float | None:
        """Reckoned, or none."""
        return None

    def host_bytes(self) -> int:
        """None."""
        return 0


class Rank:
    """Its weights. The random numbers of a version are those of any device of the same kind.

    Attributes:
        held: its rows of each tensor that it has any of.
        mesh: of all ranks; None where it is alone.
    """

    def __init__(self, post: Post, orders: Connection) -> None:
        self.post, self.case = post, post.case
        self._orders = orders
        self._share = Share(post.rank, post.case.layout.trainers)
        self.device = torch.device(self._share.device)
        self.held: dict[str, LocalShard] = {}
        self._none = {}
        for name, values in SIZES[self.case.model].tensors(1, str(self.device)):
            shard = self._share.of(values)
            if shard is None:
                self._none[name] = values[:0].float()
            else:
                self.held[name] = shard
        self.mesh: DeviceMesh | None = None

    @contextmanager
    def group(self) -> Iterator[None]:
        """The ranks' own group, where there are several."""
        ranks = self.case.layout.trainers
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if ranks == 1:
            yield
            return
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            init_method=f"tcp://{LOCAL}:{self.post.port}",
            rank=self.post.rank,
            world_size=ranks,
            timeout=timedelta(seconds=GROUP_S),
        )
        self.mesh = init_device_mesh(self.device.type, (ranks,))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a mesh may choose one by rank
        try:
            yield
        finally:
            dist.destroy_process_group()

    def refresh(self, version: int) -> None:
        """Make the weights of a version."""
        for name, values in SIZES[self.case.model].tensors(version, str(self.device)):
            shard = self._share.of(values)
            if shard is not None:
                self.held[name].tensor.copy_(shard.tensor)
        self.synchronize()

    def sharded(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor as a trainer has it: a DTensor of rows in float32, or a whole one in bf16."""
        for name, shape in self.case.shapes.items():
            local = self.held[name].tensor if name in self.held else self._none[name]
            if self.mesh is not None:
                stride = torch.empty(shape, device="meta").stride()
                local = DTensor.from_local(
                    local, self.mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
                )
            yield name, local

    def module(self) -> nn.Module:
        """What a trainer would give whoever takes modules: each tensor as a parameter, in the place of its name."""
        whole = nn.Module()
        for name, tensor in self.sharded():
            *path, last = name.split(".")
            owner = whole
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        return whole

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor whole in bf16. Of several ranks all have to go through, and each gets all."""
        for name, tensor in self.sharded():
            if isinstance(tensor, DTensor):
                half: Any = tensor.to(torch.bfloat16)  # cast before it is gathered, which is half of the bytes
                yield name, half.full_tensor()
            else:
                yield name, tensor

    def whole_part(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``whole``, and only what this rank hands over where every tensor is handed over once."""
        mine = parts(self.case)[self.post.rank]
        yield from ((name, tensor) for name, tensor in self.whole() if name in mine)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.mesh is not None:  # on its own device: torch would take one by its rank, which is the engine's
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def answer(self, what: Any) -> None:
        """Tell whoever measures."""
        self._orders.send(what)

    def ask(self, what: Any) -> None:
        """Have whoever measures do something. Raises BenchmarkFailed: it was not done in time."""
        self._orders.send(Ask(what))
        if not self._orders.poll(ASK_S):
            raise BenchmarkFailed(f"nobody has done {type(what).__name__}", remedy="the words above tell why")
        self._orders.recv()

    def allocated(self) -> int:
        """Device memory now, as where a peak begins."""
        if self.device.type != "cuda":
            return 0
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The most since."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak_elsewhere(self) -> int:
        """The most since on any device but its own, such as the engine's."""
        others = range(torch.cuda.device_count()) if self.device.type == "cuda" else ()
        return max((torch.cuda.max_memory_allocated(i) for i in others if i != self.device.index), default=0)

    def copied(self) -> Copied:
        """A plain copy to page-locked memory, while all ranks copy; to other memory on a CPU."""
        source = torch.randint(0, 255, (COPIED_BYTES[self.device.type],), dtype=torch.uint8, device=self.device)
        target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        seconds = [self.timed(lambda: target.copy_(source, non_blocking=True)) for _ in range(COPIES)]
        return Copied(source.nbytes / statistics.median(seconds))

    def timed(self, what: Callable[[], Any]) -> float:
        """Seconds of something that all ranks begin together."""
        self.synchronize()
        self.barrier()
        begin = time.monotonic()
        what()
        self.synchronize()
        return time.monotonic() - begin


def parts(case: Case) -> list[set[str]]:
    """The names that each rank hands over: as many tensors each, those of a layer together.

    An engine that reloads layer by layer keeps what it has of a layer until it has all.
    """
    names, ranks = list(case.shapes), case.layout.trainers
    cuts = [len(names) * rank // ranks for rank in range(ranks + 1)]
    return [set(names[first:last]) for first, last in itertools.pairwise(cuts)]


Maker = Callable[[Rank], AbstractContextManager[Sender]]
"""Makes a rank's sender, in the rank's process: a function of a module."""


def work(post: Post, make: Maker, orders: Connection) -> None:
    """One rank, until it is told to end."""
    with orders, suppress(EOFError, ConnectionError), ExitStack() as ending:  # whoever measures has ended
        ending.push(partial(_tell_what_ends_it, orders))
        rank = Rank(post, orders)
        with rank.group():
            before = rank.allocated()
            with make(rank) as sender:
                orders.send(None)
                version = 0
                while (order := orders.recv()) is not Order.END:
                    version += order is Order.PREPARE
                    _obey(order, version, rank, sender, before)


def _tell_what_ends_it(orders: Connection, kind: type[BaseException] | None, error: Any, _: Any) -> None:
    if kind is not None:
        orders.send(Failed(f"{kind.__name__}: {' '.join(str(error).split())}"))


def _obey(order: Order, version: int, rank: Rank, sender: Sender, before: int) -> None:
    answer: Any = None
    if order is Order.PREPARE:
        rank.refresh(version)
        rank.barrier()
        rank.allocated()  # the peak begins here, and not at what made the weights
    elif order is Order.SEND:
        begin = time.monotonic()
        sender.send(version)
        rank.answer(Sent(time.monotonic() - begin))
        sender.settle()
        answer = Settled(max(rank.peak() - before, 0), rank.peak_elsewhere())
    elif order is Order.CEILING:
        answer = rank.copied()
    elif order is Order.WIRE:
        answer = Alone(sender.wire())
    elif order is Order.HOST:
        answer = Held(sender.host_bytes())
    rank.answer(answer)
