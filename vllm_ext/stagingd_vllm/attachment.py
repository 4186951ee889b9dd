# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a vLLM worker holds while it is attached to a stage: its place, its reader, its receiver.

Both ways into vLLM (``extension.py`` and ``engine.py``) are thin shims over it; it knows nothing of vLLM's calls.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config

from stagingd.errors import OutOfOrder, VersionNotAvailable
from stagingd.health import LayerError
from stagingd.layers import Layers
from stagingd_vllm.beside import paced
from stagingd_vllm.copy_engine import Paced
from stagingd_vllm.derived import made_anew, refresh_derived
from stagingd_vllm.leased import LeasedVersion
from stagingd_vllm.outcomes import PEERS_S, together
from stagingd_vllm.outcomes import Group as Voters
from stagingd_vllm.place import Place, groups_of
from stagingd_vllm.plan import staged_tensors
from stagingd_vllm.prefetcher import Prefetcher
from stagingd_vllm.quantization_error import Errors, layer_errors, summed, tensor_errors
from stagingd_vllm.reader import Reader
from stagingd_vllm.receiver import LayoutChanged, Receiver, UpdateReport
from stagingd_vllm.reporter import Reporter, Told
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.shadow import GIB, NoRoomForShadow, Shadow
from stagingd_vllm.skeleton import derive_plan, loading
from stagingd_vllm.sleep import allocators, refuse_asleep, weights_asleep
from stagingd_vllm.witness import Witness

NOT_ASKED_FOR = "no memory is allowed for prefetching"
FOLLOW_S = 7 * 24 * 3600.0
"""How long a worker waits for the next version by itself, in seconds: a trainer may be stopped over a holiday."""
READ_S = 30.0
"""The longest that a version which is being read may take to end when its worker leaves, in seconds."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SwapReport:
    """One version made live: bytes copied, and the seconds that the worker spent on starting it."""

    version: int
    bytes_copied: int
    seconds: float


class Attachment:
    """A worker's part in a stage. ``Attachment.to`` makes it, ``detach`` ends it.

    Args:
        place: the worker's.
        reader: it reads the stage.
        receiver: it writes the live weights.
        scale_rule: how scales follow from moments.
        shadow: what versions are prefetched into; without it they are read in place.
        in_place_because: why there is no shadow.
        groups: their product is the engine.
        reporter: tells the daemon what was made live; without it nobody is told.
    """

    def __init__(
        self,
        place: Place,
        reader: Reader,
        receiver: Receiver,
        scale_rule: str = "amax",
        shadow: Shadow | None = None,
        in_place_because: str = NOT_ASKED_FOR,
        groups: Sequence[Voters] = (),
        reporter: Reporter | None = None,
    ) -> None:
        self.place = place
        self.reader = reader
        self.receiver = receiver
        self.scale_rule = scale_rule
        self._shadow = shadow
        self._in_place_because = in_place_because
        self._prefetcher = Prefetcher(reader, self._write_to_shadow)
        self._groups = groups
        self._reporter = reporter
        self._seen: torch.Tensor | None = None

    @classmethod
    def to(
        cls,
        stage: str,
        *,
        model: torch.nn.Module,
        vllm_config: VllmConfig,
        runner: object | None = None,
        socket: str | None = None,
        engine: str = "engine",
        scale_rule: str = "amax",
        prefetch_gib: float = 0.0,
        timeout_s: float = 60.0,
    ) -> Attachment:
        """Joins a stage, and derives which part of it this worker reads.

        Args:
            stage: name of the stage.
            model: the worker's live model.
            vllm_config: the configuration that it was made from.
            runner: the worker's model runner, whose steps prefetching keeps to; without it, it costs more.
            socket: the daemon's socket; None for the usual one.
            engine: what this engine is called; its workers change versions together. Data-parallel replicas add
                their number to it.
            scale_rule: how scales follow from moments: "amax" as the engine itself, or "sigma:k" to clip at
                |mean| + k standard deviations.
            prefetch_gib: memory on the worker's device that prefetching may take, in GiB: as much as the weights do.
                Where that is not enough, versions are read in place; a line in the log says what that costs.
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
            staged = staged_tensors(reader.catalog)
            aliases = {alias.alias: alias.name for alias in reader.catalog.aliases}
            plan = derive_plan(model, vllm_config, staged, aliases)
            refresh = _refreshing(model, vllm_config)
            receiver = Receiver(model, plan, reader, rule, refresh, loading(vllm_config))
            undo.callback(receiver.close)
            through = partial(paced, receiver.copies, runner, model, receiver.device)
            shadow, in_place_because = _shadow(receiver, reader, rule, prefetch_gib, through)
            undo.pop_all()
        groups = groups_of(vllm_config.parallel_config)
        reporter = Reporter(stage, place.engine, place.rank, socket)
        return cls(place, reader, receiver, scale_rule, shadow, in_place_because, groups, reporter)

    def update(
        self, *, version: int | None = None, newer_than: int | None = None, timeout_s: float = 60.0
    ) -> UpdateReport:
        """Applies a version: the newest, or ``version``, or the first that is newer than ``newer_than``.

        Nobody may compute with the weights meanwhile.

        Raises:
            OutOfOrder: the engine sleeps: its weights have no memory; or a version is being prefetched.
            DeadlineExceeded: no such version within ``timeout_s`` seconds.
            LayoutChanged: a live parameter is not where it was; nothing was written.
            LoaderFailed: the model's own loader did not take what only it can take.
            LeaseLost: the weights may be a mixture of two versions; update again before generating.
        """
        refuse_asleep(weights_asleep(allocators()))
        with self._prefetcher.aside():
            lease = self.reader.lease(version=version, newer_than=newer_than, timeout_s=timeout_s)
            report = self.receiver.apply(lease)
        self._seen = self._witness.look()
        self._tell("updated", report.version, report.bytes_read, report.seconds_read)
        return report

    def _tell(self, what: Told, version: int, size: int, seconds: float, errors: tuple[LayerError, ...] = ()) -> None:
        if self._reporter is not None:
            self._reporter.tell(what, version, size, seconds, errors)

    def prefetch(
        self,
        *,
        version: int | None = None,
        newer_than: int | None = None,
        early: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        """Begins to read a version beside the engine, and returns: the newest, or as ``update`` chooses.

        With ``early`` one that trainers are still flushing will do, where no complete version will: it is read as it
        lands, and cannot be swapped in before it is sealed.

        Raises:
            NoRoomForShadow: versions are read in place here; why.
            OutOfOrder: one is being prefetched.
        """
        self._require_shadow()
        self._prefetcher.start(version=version, newer_than=newer_than, early=early, timeout_s=timeout_s)

    @property
    def reading(self) -> bool:
        """Whether a version is being read beside the engine; one that is only waited for is not."""
        return self._prefetcher.reading

    def prefetched(self) -> int | None:
        """The version that can be swapped in; None while it is read, and when none was asked for.

        Raises:
            StagingError: what kept it from being read; the live weights are as they were.
        """
        return self._prefetcher.version()

    def swap(
        self, *, version: int | None, timeout_s: float = 0.0, follow: bool = False, early: bool = False
    ) -> SwapReport:
        """Makes live what was prefetched: on all workers of the engine, or on none.

        To be called on all of them between the same two steps.

        Args:
            version: which one has been prefetched.
            timeout_s: seconds to wait for what is still being read.
            follow: then waits for the next version and prefetches that, so that the engine need not be asked.
            early: that one may still be flushed by trainers.

        Raises:
            RefusedByAll: a worker does not have it, its layout changed, or it sleeps; nothing was written on any.
        """
        started = time.perf_counter()
        with together(self._groups, timeout_s + PEERS_S):
            refuse_asleep(weights_asleep(allocators()))
            shadow = self._require_shadow()
            there = self._prefetcher.version(timeout_s)
            if version is None or there != version:
                prefetched = "none" if there is None else there
                raise OutOfOrder(
                    f"version {version} is to be swapped in, and {prefetched} has been prefetched",
                    remedy="call stagingd_prefetch, and swap in what stagingd_prefetched gives on all workers",
                )
            self.receiver.check()
        self.receiver.take(shadow, there)
        self._prefetcher.forget()
        if follow:
            self._prefetcher.start(version=None, newer_than=there, early=early, timeout_s=FOLLOW_S)
        self._seen = self._witness.look()
        report = SwapReport(there, shadow.bytes, time.perf_counter() - started)
        self._tell("swapped", there, shadow.bytes, report.seconds)
        return report

    def _require_shadow(self) -> Shadow:
        if self._shadow is None:
            raise NoRoomForShadow(self._in_place_because, remedy="attach with prefetch_gib, or with more of it")
        return self._shadow

    def _write_to_shadow(self, lease: LeasedVersion) -> None:
        self._require_shadow().write(lease)

    @property
    def version(self) -> int | None:
        """The version that the weights hold.

        None before the first update, after one that failed half-way, while the engine sleeps, and when something
        else has written to the weights since. The last is told by a sample of them: some hundred bytes of each of
        some tens of parameters, spread evenly, so what leaves nearly every element as it was can pass unseen.
        """
        if self._seen is None or weights_asleep(allocators()):
            return None
        try:
            self.receiver.check()
        except LayoutChanged:
            return None
        return self.receiver.version if torch.equal(self._seen, self._witness.look()) else None

    def quantization_error(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """How far what the weights hold, by the scale rule and by amax beside it, lies from what is staged.

        Of the worker's own slice; the weights are not written. See ``StagingdWorkerExtension``.

        Raises:
            OutOfOrder: the weights hold no version of the stage, or one that the stage has replaced since; or a version
                is being prefetched.
            DeadlineExceeded: no lease within ``timeout_s`` seconds.
            LeaseLost: looking took longer than a lease lasts.
        """
        version = self.version
        if version is None:
            raise OutOfOrder("the weights hold no version of the stage", remedy="call stagingd_update first")
        started = time.perf_counter()
        rules = {rule: ScaleRule.parse(rule) for rule in (self.scale_rule, "amax")}
        with self._prefetcher.aside(), self._leased_again(version, timeout_s) as lease:
            told = tensor_errors(self.receiver.plan, self.receiver.homes, self.reader.catalog, lease, rules)
        found = {name: summed(errors.values()) for name, errors in told.items()}
        self._tell("examined", version, 0, time.perf_counter() - started, self._by_layer(told.values()))
        return {
            "version": version,
            "rank": self.place.rank,
            "scale_rule": self.scale_rule,
            "total": {rule: error.figures() for rule, error in summed(found.values()).items()},
            "parameters": {
                name: {rule: error.figures() for rule, error in errors.items()} for name, errors in found.items()
            },
        }

    def _by_layer(self, found: Iterable[Mapping[str, Errors]]) -> tuple[LayerError, ...]:
        """What the worker's own scale rule costs in the layers of the stage."""
        layers = Layers.from_tensors([tensor.name for tensor in self.reader.catalog.tensors])
        return layer_errors(layers, ((name, errors[self.scale_rule]) for one in found for name, errors in one.items()))

    def _leased_again(self, version: int, timeout_s: float) -> LeasedVersion:
        try:
            return self.reader.lease(version=version, timeout_s=timeout_s)
        except VersionNotAvailable as error:
            raise OutOfOrder(f"{error.what}, and the weights hold that one", remedy="update again, then ask") from error

    @cached_property
    def _witness(self) -> Witness:
        return Witness(home.weight for _, home in sorted(self.receiver.homes.items()))

    def summary(self) -> dict[str, Any]:
        """The worker's place, and what every update reads: numbers, strings, and lists and maps of strings."""
        plan = self.receiver.plan
        return {
            "rank": self.place.rank,
            "ranks": self.place.ranks,
            "engine": self.place.engine,
            "mode": "prefetch" if self._shadow else "in_place",
            "in_place_because": "" if self._shadow else self._in_place_because,
            "tensors": len(plan.tensors),
            "entries": len(plan.entries),
            "bytes_per_update": plan.bytes_per_update,
            "bytes_of_stage": plan.staged_bytes,
            "unread": list(plan.unread),
            "computed": {tensor.tensor: tensor.reason for tensor in plan.computed},
            "plan": str(plan),
        }

    def detach(self) -> None:
        """Leaves the stage; the weights stay as they are. May be called twice.

        Raises:
            DeadlineExceeded: a version is being prefetched, and does not end.
        """
        self.reader.leave()  # trainers may take long to complete what is read early
        self._prefetcher.close(READ_S)
        if self._reporter is not None:
            self._reporter.close()
        if self._shadow is not None:
            self._shadow.close()
        self.receiver.close()
        self.reader.close()


def _shadow(
    receiver: Receiver, reader: Reader, rule: ScaleRule, prefetch_gib: float, through: Callable[[], Paced | None]
) -> tuple[Shadow | None, str]:
    """What versions are prefetched into, or why there is none."""
    if prefetch_gib <= 0:
        return None, NOT_ASKED_FOR
    plan, homes, device = receiver.plan, receiver.homes, receiver.device
    with contextlib.ExitStack() as undo:
        try:
            if (made := through()) is not None:
                undo.callback(made.close)
            shadow = Shadow(plan, homes, reader.catalog, rule, device, prefetch_gib * GIB, made)
        except NoRoomForShadow as refused:
            logger.warning("%s", refused)
            return None, str(refused)
        undo.pop_all()
    return shadow, ""


def _refreshing(model: torch.nn.Module, vllm_config: VllmConfig) -> Callable[[], None]:
    modules = made_anew(model)

    def refresh() -> None:
        with set_current_vllm_config(vllm_config):
            refresh_derived(modules, vllm_config.model_config.dtype)

    return refresh if modules else lambda: None
