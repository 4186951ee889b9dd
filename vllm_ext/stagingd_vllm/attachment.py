# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a vLLM worker holds while it is attached to a stage: its place, its reader, its receiver.

Both ways into vLLM (``extension.py`` and ``engine.py``) are thin shims over it; it knows nothing of vLLM's calls.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_pcp_group, get_pp_group, get_tp_group

from stagingd.errors import OutOfOrder, VersionNotAvailable
from stagingd_vllm.derived import refresh_derived
from stagingd_vllm.plan import StagedTensor
from stagingd_vllm.quantization_error import quantization_errors, summed
from stagingd_vllm.reader import Reader
from stagingd_vllm.receiver import LayoutChanged, Receiver, UpdateReport
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.skeleton import derive_plan, loading
from stagingd_vllm.versions import EngineNotSupported

WITNESS_PARAMETERS = 64
WITNESS_BYTES = 256
"""So many bytes of so many parameters, spread evenly, stand for the weights when they are looked at again."""


class Group(Protocol):
    """The part of vLLM's process groups that tells a worker's place."""

    rank_in_group: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's rank among all workers of one engine, and their number.

    A data-parallel replica is an engine of its own: it takes requests, and changes versions, by itself.
    """

    engine: str
    rank: int
    ranks: int

    @classmethod
    def within(cls, engine: str, replica: int, replicas: int, groups: tuple[Group, ...]) -> Place:
        """The place by groups, the slowest varying first, of one of several data-parallel replicas.

        The first replica of a model that vLLM runs as separate engines cannot be told from an engine without any
        replicas: it keeps the bare name.
        """
        rank, ranks = 0, 1
        for group in groups:
            rank, ranks = rank * group.world_size + group.rank_in_group, ranks * group.world_size
        return cls(f"{engine}-dp{replica}" if replica or replicas > 1 else engine, rank, ranks)

    @classmethod
    def of_worker(cls, engine: str, parallel: ParallelConfig) -> Place:
        """The place of the worker that this process is.

        Expert parallelism spreads experts over the same workers, so it adds no ranks.

        Raises:
            EngineNotSupported: the groups are not those of the configured sizes, or experts move between workers.
        """
        if getattr(parallel, "enable_eplb", False):
            raise EngineNotSupported(
                "the engine moves experts between its workers while it runs (enable_eplb)",
                remedy="start it without: which experts a worker holds has to stay as it is",
            )
        groups = (get_pp_group(), get_pcp_group(), get_tp_group())
        place = cls.within(engine, parallel.data_parallel_index, parallel.data_parallel_size, groups)
        if place.ranks != parallel.world_size:
            raise EngineNotSupported(
                f"the engine has {parallel.world_size} workers per replica, and its pipeline and tensor groups "
                f"count {place.ranks}",
                remedy="use tensor, pipeline, expert and data parallelism alone",
            )
        return place


class Attachment:
    """A worker's part in a stage. ``Attachment.to`` makes it, ``detach`` ends it."""

    def __init__(self, place: Place, reader: Reader, receiver: Receiver, scale_rule: str = "amax") -> None:
        self.place = place
        self.reader = reader
        self.receiver = receiver
        self.scale_rule = scale_rule
        self._witness: torch.Tensor | None = None

    @classmethod
    def to(
        cls,
        stage: str,
        *,
        model: torch.nn.Module,
        vllm_config: VllmConfig,
        socket: str | None = None,
        engine: str = "engine",
        scale_rule: str = "amax",
        timeout_s: float = 60.0,
    ) -> Attachment:
        """Joins a stage, and derives which part of it this worker reads.

        Args:
            stage: name of the stage.
            model: the worker's live model.
            vllm_config: the configuration that it was made from.
            socket: the daemon's socket; None for the usual one.
            engine: what this engine is called; its workers change versions together. Data-parallel replicas add
                their number to it.
            scale_rule: how scales follow from moments: "amax" as the engine itself, or "sigma:k" to clip at
                |mean| + k standard deviations.
            timeout_s: seconds to wait for the stage to be declared.

        Raises:
            ScaleRuleRefused: there is no such scale rule.
            EngineNotSupported: the engine is spread over its workers in a way that is not known.
            PlanRefused: the stage does not fit the model, or the model is of a kind that is not understood.
            LayoutUnknown: the engine keeps a parameter in a way that is not known.
            DaemonUnreachable, DeadlineExceeded, RankTaken: as ``Reader.attach`` says.
        """
        rule = ScaleRule.parse(scale_rule)
        place = Place.of_worker(engine, vllm_config.parallel_config)
        with contextlib.ExitStack() as undo:
            reader = Reader.attach(
                stage, engine=place.engine, rank=place.rank, ranks=place.ranks, socket=socket, timeout_s=timeout_s
            )
            undo.callback(reader.close)
            staged = {tensor.name: StagedTensor(tensor.dtype, tensor.shape) for tensor in reader.catalog.tensors}
            aliases = {alias.alias: alias.name for alias in reader.catalog.aliases}
            plan = derive_plan(model, vllm_config, staged, aliases)
            receiver = Receiver(model, plan, reader, rule, lambda: _refresh(model, vllm_config), loading(vllm_config))
            undo.pop_all()
        return cls(place, reader, receiver, scale_rule)

    def update(
        self, *, version: int | None = None, newer_than: int | None = None, timeout_s: float = 60.0
    ) -> UpdateReport:
        """Applies a version: the newest, or ``version``, or the first that is newer than ``newer_than``.

        Nobody may compute with the weights meanwhile.

        Raises:
            OutOfOrder: the engine sleeps: its weights have no memory.
            DeadlineExceeded: no such version within ``timeout_s`` seconds.
            LayoutChanged: a live parameter is not where it was; nothing was written.
            LoaderFailed: the model's own loader did not take what only it can take.
            LeaseLost: the weights may be a mixture of two versions; update again before generating.
        """
        refuse_asleep(weights_asleep(_allocators()))
        lease = self.reader.lease(version=version, newer_than=newer_than, timeout_s=timeout_s)
        report = self.receiver.apply(lease)
        self._witness = self._look()
        return report

    @property
    def version(self) -> int | None:
        """The version that the weights hold.

        None before the first update, after one that failed half-way, while the engine sleeps, and when something
        else has written to the weights since. The last is told by a sample of them: some hundred bytes of each of
        some tens of parameters, spread evenly, so what leaves nearly every element as it was can pass unseen.
        """
        if self._witness is None or weights_asleep(_allocators()):
            return None
        try:
            self.receiver.check()
        except LayoutChanged:
            return None
        return self.receiver.version if torch.equal(self._witness, self._look()) else None

    def quantization_error(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """How far what the weights hold, by the scale rule and by amax beside it, lies from what is staged.

        Of the worker's own slice; the weights are not written. See ``StagingdWorkerExtension``.

        Raises:
            OutOfOrder: the weights hold no version of the stage, or one that the stage has replaced since.
            DeadlineExceeded: no lease within ``timeout_s`` seconds.
            LeaseLost: looking took longer than a lease lasts.
        """
        version = self.version
        if version is None:
            raise OutOfOrder("the weights hold no version of the stage", remedy="call stagingd_update first")
        try:
            lease = self.reader.lease(version=version, timeout_s=timeout_s)
        except VersionNotAvailable as error:
            raise OutOfOrder(f"{error.what}, and the weights hold that one", remedy="update again, then ask") from error
        rules = {rule: ScaleRule.parse(rule) for rule in (self.scale_rule, "amax")}
        with lease:
            found = quantization_errors(self.receiver.plan, self.receiver.homes, self.reader.catalog, lease, rules)
        return {
            "version": version,
            "rank": self.place.rank,
            "scale_rule": self.scale_rule,
            "total": {rule: error.figures() for rule, error in summed(found.values()).items()},
            "parameters": {
                name: {rule: error.figures() for rule, error in errors.items()} for name, errors in found.items()
            },
        }

    def _look(self) -> torch.Tensor:
        """A sample of the bytes of the live weights, on their device: WITNESS_BYTES of each parameter at most."""
        written = [home.weight for _, home in sorted(self.receiver.homes.items())]
        return torch.cat([_sample(weight) for weight in written[:: -(-len(written) // WITNESS_PARAMETERS)]])

    def summary(self) -> dict[str, Any]:
        """The worker's place, and what every update reads: numbers, strings, and lists and maps of strings."""
        plan = self.receiver.plan
        return {
            "rank": self.place.rank,
            "ranks": self.place.ranks,
            "engine": self.place.engine,
            "tensors": len(plan.tensors),
            "entries": len(plan.entries),
            "bytes_per_update": plan.bytes_per_update,
            "bytes_of_stage": plan.staged_bytes,
            "unread": list(plan.unread),
            "computed": {tensor.tensor: tensor.reason for tensor in plan.computed},
            "plan": str(plan),
        }

    def detach(self) -> None:
        """Leaves the stage; the weights stay as they are. May be called twice."""
        self.receiver.close()
        self.reader.close()


def _refresh(model: torch.nn.Module, vllm_config: VllmConfig) -> None:
    with set_current_vllm_config(vllm_config):
        refresh_derived(model, vllm_config.model_config.dtype)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    count = min(parameter.numel(), WITNESS_BYTES // parameter.element_size())
    # Evenly over the memory that it has, whatever the order of its dimensions.
    spread = torch.as_strided(parameter, (count,), (parameter.numel() // count,), parameter.storage_offset())
    return spread.contiguous().view(torch.uint8)


class Allocation(Protocol):
    """The part of an allocation of vLLM's sleep mode that tells whether it has memory."""

    tag: str
    is_asleep: bool


class Allocator(Protocol):
    """The part of vLLM's sleep-mode allocators, in 0.26 as in 0.32, that tells what it holds."""

    pointer_to_data: Mapping[int, Allocation]


def weights_asleep(allocators: Iterable[Allocator]) -> bool:
    """Whether any of the weights has no memory."""
    return any(
        allocation.is_asleep and allocation.tag == "weights"
        for allocator in allocators
        for allocation in allocator.pointer_to_data.values()
    )


def refuse_asleep(asleep: bool) -> None:
    """Raises OutOfOrder for an engine whose weights are asleep: writing to them would end the process."""
    if asleep:
        raise OutOfOrder("the engine sleeps, and its weights have no memory", remedy="wake up its weights first")


def _allocators() -> list[Allocator]:
    """Those of this process. Without sleep mode nobody has imported them, and they need not load everywhere."""
    modules = (("vllm.device_allocator.cumem", "CuMemAllocator"), ("vllm.device_allocator.xpumem", "XpuMemAllocator"))
    classes = [getattr(sys.modules[module], name) for module, name in modules if module in sys.modules]
    return [allocator.instance for allocator in classes if allocator.instance is not None]
