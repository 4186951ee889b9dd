# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Where a worker stands, what versions of vLLM are known, and what is refused: without an engine."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stagingd_vllm.outcomes import RefusedByAll, refuse_once, together
from stagingd_vllm.plan import Computed, ReadPlan
from stagingd_vllm.versions import EngineNotSupported, Standing, check_base, standing

from stagingd.errors import DeadlineExceeded, OutOfOrder

vllm = pytest.importorskip("vllm")

from stagingd_vllm.attachment import Attachment  # noqa: E402
from stagingd_vllm.engine import StagingdEngine  # noqa: E402
from stagingd_vllm.place import Place  # noqa: E402
from stagingd_vllm.plugin import register  # noqa: E402
from stagingd_vllm.receiver import UpdateReport  # noqa: E402
from stagingd_vllm.sleep import refuse_asleep, weights_asleep  # noqa: E402
from vllm.device_allocator import AllocationData  # noqa: E402
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: E402


@dataclass
class FakeGroup:
    rank_in_group: int
    world_size: int
    cpu_group: Any = None


def test_a_rank_counts_over_pipeline_and_tensor_parallel_workers() -> None:
    groups = [(FakeGroup(stage, 3), FakeGroup(0, 1), FakeGroup(rank, 2)) for stage in range(3) for rank in range(2)]
    assert [Place.within("e", 0, 1, group) for group in groups] == [Place("e", rank, 6) for rank in range(6)]


def test_every_data_parallel_replica_is_an_engine_of_its_own() -> None:
    alone = (FakeGroup(0, 1),)
    assert [Place.within("e", replica, 2, alone).engine for replica in (0, 1)] == ["e-dp0", "e-dp1"]
    # Replicas that vLLM runs as separate engines: each believes to be the only one.
    assert [Place.within("e", replica, 1, alone).engine for replica in (0, 1)] == ["e", "e-dp1"]


def test_a_worker_tells_which_tensors_its_models_loader_computes_with_and_why() -> None:
    computed = Computed("a_log", 8, ("a",), "the loader computes with staged tensor a_log: aten.exp.default")
    receiver = SimpleNamespace(plan=ReadPlan((), 16, computed=(computed,)))
    told = Attachment(Place("e", 0, 1), SimpleNamespace(), receiver).summary()  # type: ignore[arg-type]
    assert told["computed"] == {"a_log": computed.reason}
    assert told["bytes_per_update"] == 8
    assert "1 tensors by the model's own loader" in told["plan"]


class Told:
    """Stands for a reporter."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, int, int]] = []
        self.closed = False

    def tell(self, what: str, version: int, size: int, seconds: float, errors: tuple[object, ...] = ()) -> None:
        assert seconds >= 0
        assert not errors
        self.reports.append((what, version, size))

    def close(self) -> None:
        self.closed = True


class Fakes(SimpleNamespace):
    """Reader, receiver and shadow at once, of one version."""

    bytes = 77

    def lease(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(version=5)

    def apply(self, lease: SimpleNamespace) -> UpdateReport:
        return UpdateReport(lease.version, 1, 33, 0.25)

    def check(self) -> None: ...
    def leave(self) -> None: ...
    def take(self, shadow: object, version: int) -> None: ...
    def close(self) -> None: ...


def test_a_worker_reports_what_it_makes_live_and_stops_reporting_when_it_leaves() -> None:
    fakes, told = Fakes(), Told()
    attachment = Attachment(Place("e", 0, 1), fakes, fakes, shadow=fakes, reporter=told)  # type: ignore[arg-type]
    attachment.__dict__["_witness"] = SimpleNamespace(look=lambda: None)
    attachment._prefetcher = SimpleNamespace(  # type: ignore[assignment]
        aside=nullcontext, version=lambda _: 6, forget=lambda: None, close=lambda _: None
    )
    attachment.update()
    attachment.swap(version=6)
    assert told.reports == [("updated", 5, 33), ("swapped", 6, 77)]
    assert not told.closed
    attachment.detach()
    assert told.closed


@dataclass
class FakeAllocation:
    tag: str
    is_asleep: bool


@dataclass
class FakeAllocator:
    pointer_to_data: dict[int, FakeAllocation] = field(default_factory=dict)


def test_weights_that_sleep_are_refused_and_a_sleeping_cache_is_not() -> None:
    cache_asleep = FakeAllocator({1: FakeAllocation("weights", False), 2: FakeAllocation("kv_cache", True)})
    refuse_asleep(weights_asleep([]))
    refuse_asleep(weights_asleep([FakeAllocator(), cache_asleep]))
    cache_asleep.pointer_to_data[3] = FakeAllocation("weights", True)
    with pytest.raises(OutOfOrder, match="no memory"):
        refuse_asleep(weights_asleep([FakeAllocator(), cache_asleep]))


def test_vllms_allocation_has_what_tells_that_it_sleeps() -> None:
    allocation = AllocationData(handle=(0, 0, 0, 0), tag="weights", is_asleep=True)
    assert weights_asleep([FakeAllocator({0: allocation})])  # type: ignore[dict-item]


class Given:
    """What vLLM's base class has to offer."""

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None: ...
    def parse_init_info(self, init_dict: Any) -> None: ...
    def parse_update_info(self, update_dict: Any) -> None: ...
    def set_weight_update_target(self, model: Any, model_config: Any) -> None: ...
    def reset_weight_update_target(self) -> None: ...


class Base26(Given, abc.ABC):
    """The shape of vLLM 0.26's base class."""

    @abc.abstractmethod
    def init_transfer_engine(self, init_info: Any) -> None: ...
    @abc.abstractmethod
    def start_weight_update(self) -> None: ...
    @abc.abstractmethod
    def receive_weights(self, update_info: Any) -> None: ...
    @abc.abstractmethod
    def finish_weight_update(self) -> None: ...
    @abc.abstractmethod
    def shutdown(self) -> None: ...
    @staticmethod
    @abc.abstractmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None: ...


class Base32(Base26):
    """That of 0.32: sending is the business of another class."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None: ...


def test_base_classes_of_known_shapes_are_taken() -> None:
    check_base(Base26, "0.26.0")
    check_base(Base32, "0.32.0")
    check_base(Base32, "0.99.0")


def test_a_base_class_of_another_shape_is_refused_with_what_was_found() -> None:
    class Unknown(Base32):
        receive_weights = None  # type: ignore[assignment]

        def __init__(self, config: Any, model: Any) -> None: ...
        @abc.abstractmethod
        def swap_weights(self) -> None: ...

    with pytest.raises(EngineNotSupported) as refusal:
        check_base(Unknown, "0.40.1")
    for said in ("asks for swap_weights", "no receive_weights", "from (self, config, model)", "0.40.1", "nobody"):
        assert said in refusal.value.what


def test_versions_are_known_by_what_was_done_with_them() -> None:
    found = [standing(version) for version in ("0.26.0", "0.32.0+cpu", "0.30.1", "0.34.0", "1.26.0", "main")]
    run, read, unknown = Standing.RUN, Standing.READ, Standing.UNKNOWN
    assert found == [run, run, read, unknown, unknown, unknown]


def test_the_plugin_may_be_loaded_twice_and_makes_the_backend_known() -> None:
    register()
    register()
    model = torch.nn.Linear(1, 1)
    config = SimpleNamespace(parallel_config=None, model_config=None)
    engine = WeightTransferEngineFactory.create_engine(
        SimpleNamespace(backend="stagingd"), config, torch.device("cpu"), model
    )
    assert type(engine) is StagingdEngine
    assert not engine.supports_draft_weight_update
    engine.shutdown()
    with pytest.raises(OutOfOrder, match="does not send"):
        engine.trainer_send_weights(iter(()), {})


def in_threads(ranks: int, act: Callable[[FakeGroup], None]) -> list[Exception | None]:
    """Runs one thread per rank, each with a gloo group of its own; returns what each raised."""
    store = dist.HashStore()
    raised: list[Exception | None] = [None] * ranks

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=20))
        try:
            act(FakeGroup(rank, ranks, group))
        except Exception as error:  # noqa: BLE001
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


def test_what_one_worker_refuses_all_refuse_with_its_words() -> None:
    def act(group: FakeGroup) -> None:
        with together([group], 20.0):
            if group.rank_in_group == 1:
                raise OutOfOrder("rank 1 is not attached" + " at all" * 2000, remedy="attach it")

    raised = in_threads(3, act)
    assert [type(error) for error in raised] == [RefusedByAll] * 3
    assert all("out_of_order: rank 1 is not attached at all" in str(error) for error in raised)
    assert all(str(error).endswith("Attach it.") for error in raised)


def test_an_error_that_is_none_of_ours_is_told_too_and_success_is_no_error() -> None:
    def act(group: FakeGroup) -> None:
        with together([group], 20.0):
            pass
        with together([FakeGroup(0, 1), group], 20.0):
            if group.rank_in_group == 0:
                raise RuntimeError("out of memory")

    assert ["RuntimeError: out of memory" in str(error) for error in in_threads(2, act)] == [True] * 2


def test_a_worker_that_says_nothing_is_not_waited_for_without_end() -> None:
    done = threading.Event()

    def act(group: FakeGroup) -> None:
        if group.rank_in_group == 1:
            done.wait(30)
            return
        try:
            with together([group], 0.2):
                pass
        finally:
            done.set()

    first, second = in_threads(2, act)
    assert isinstance(first, DeadlineExceeded)
    assert second is None


class FakeWorker:
    """The part of vLLM's worker that its weight-transfer calls use."""

    def __init__(self, rank: int, backend: str = "mp") -> None:
        self.rank = rank
        self.parallel_config = SimpleNamespace(world_size=2, distributed_executor_backend=backend)
        self._weight_update_active = True

    def update_weights(self, error: Exception) -> None:
        if not self._weight_update_active:
            raise RuntimeError("no session")
        raise error


def test_only_the_last_worker_raises_what_all_of_them_raise() -> None:
    class Worker(FakeWorker): ...

    refuse_once(Worker, lambda worker: True)
    refuse_once(Worker, lambda worker: True)  # wrapped once
    by_all = RefusedByAll("no", remedy="wait")
    Worker(0).update_weights(by_all)
    for worker in (Worker(1), Worker(0, backend="external_launcher")):
        with pytest.raises(RefusedByAll):
            worker.update_weights(by_all)
    closed = Worker(0)
    closed._weight_update_active = False
    closed.update_weights(by_all)


def test_what_one_worker_alone_raises_is_never_kept_silent() -> None:
    class Worker(FakeWorker): ...

    refuse_once(Worker, lambda worker: True)
    with pytest.raises(RuntimeError, match="CUDA"):
        Worker(0).update_weights(RuntimeError("CUDA"))

    class OthersWorker(FakeWorker): ...

    refuse_once(OthersWorker, lambda worker: False)
    with pytest.raises(RefusedByAll):
        OthersWorker(0).update_weights(RefusedByAll("no", remedy="wait"))
