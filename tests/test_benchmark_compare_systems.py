# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What systems of ``benchmarks.compare`` ask of engine and trainers, and in which order, where there is no GPU."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import pickle
import subprocess
import types
from typing import Any

import pytest

from benchmarks.compare.case import LAYOUTS, Case
from benchmarks.compare.measured import Ceilings, Measured, Survival, Update, Wire
from benchmarks.compare.run import killed
from benchmarks.compare.systems import cuda_ipc, nccl
from benchmarks.compare.systems.checkpoint_engine import Served
from benchmarks.compare.systems.cuda_ipc import Export, Imported, Part, loaded
from benchmarks.compare.systems.dcp import Checkpointed, staged_once
from benchmarks.compare.systems.nccl import Received
from benchmarks.compare.systems.torch_save import Saved
from benchmarks.host_case import BenchmarkFailed

pytest.importorskip("vllm")

CASE = Case("debug", LAYOUTS["four"], "bfloat16")
STANDS = ["pause_scheduler_async", "start_weight_update", "update_weights", "finish_weight_update"]


class Engine:
    """Notes what it is asked, after trainers have had their turn; ``compare_`` methods answer what they are told to."""

    def __init__(self, said: list[str], answers: list[dict[str, Any]] | None = None, fails: str | None = None) -> None:
        self.said, self.answers, self.fails = said, answers or [{}], fails
        self.told: dict[str, Any] = {}
        self.engine_core, self.errored = self, False

    def __getattr__(self, name: str) -> Any:
        async def ask(*args: Any, **options: Any) -> None:
            await asyncio.sleep(0)
            self.said.append(name)
            self.told[name] = (args, options)
            if name == self.fails:
                raise RuntimeError(f"{name} failed")

        return ask

    async def collective_rpc(self, method: str, **options: Any) -> list[dict[str, Any]]:
        self.said.append(method)
        self.told[method] = options
        return self.answers


class Fleet:
    """Trainers that are held for 0.25 s, as they say."""

    def __init__(self, said: list[str], *, stuck: bool = False) -> None:
        self.said, self.stuck = said, stuck
        self.done_at: float | None = None
        self.newest = 0

    async def prepare(self) -> int:
        self.said.append("prepare")
        return 1

    async def send(self) -> float:
        self.said.append("send")
        if self.stuck:
            await asyncio.Event().wait()
        self.said.append("sent")
        return 0.25

    async def settled(self) -> None:
        self.said.append("settled")

    async def wire(self) -> float:
        return 0.125


def run(what: Any) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(30):
            return await what

    return asyncio.run(limited())


def test_nccl_begins_to_send_while_the_engine_is_brought_to_a_stand_and_lets_it_go_on_at_the_end() -> None:
    said: list[str] = []
    engine = Engine(said)
    received = Received(Fleet(said), engine, CASE, packed=True)  # type: ignore[arg-type]
    assert run(received.deliver()) == 0.25
    assert [one for one in said if one not in ("send", "sent")] == [*STANDS, "resume_scheduler_async"]
    assert said.index("send") < said.index("start_weight_update")
    ((request,), _) = engine.told["update_weights"]
    assert request.update_info["names"] == list(CASE.shapes)
    assert request.update_info["packed"] is True
    assert engine.told["pause_scheduler_async"][1] == {"mode": "keep", "clear_cache": False}


def test_an_engine_that_fails_in_the_middle_ends_the_update_though_trainers_are_held() -> None:
    said: list[str] = []
    engine = Engine(said, fails="update_weights")
    received = Received(Fleet(said, stuck=True), engine, CASE, packed=False)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="update_weights failed"):
        run(received.deliver())


def test_trainers_that_fail_end_the_update_though_the_engine_waits_for_them() -> None:
    class Failing(Fleet):
        async def send(self) -> float:
            raise RuntimeError("out of memory")

    class Waiting(Engine):
        async def update_weights(self, _: Any) -> None:
            await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="out of memory"):
        run(Received(Failing([]), Waiting([]), CASE, packed=True).deliver())  # type: ignore[arg-type]


def test_an_engine_that_does_not_answer_is_told_of_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(Engine):
        async def update_weights(self, _: Any) -> None:
            await asyncio.Event().wait()

    for module in (nccl, cuda_ipc):
        monkeypatch.setattr(module, "UPDATE_S", 0.01)
    with pytest.raises(BenchmarkFailed, match=r"an update over NCCL took longer than 0.01 s"):
        run(Received(Fleet([]), Waiting([]), CASE, packed=True).deliver())  # type: ignore[arg-type]
    with pytest.raises(BenchmarkFailed, match=r"a part by CUDA IPC took longer than 0.01 s"):
        run(loaded(Waiting([]), Part({"names": []})))


def test_nccls_wire_is_the_slower_side_and_checkpoints_are_reckoned() -> None:
    engine = Engine([], [{"seconds": 0.1}, {"seconds": 0.2}])
    received = Received(Fleet([]), engine, CASE, packed=True)  # type: ignore[arg-type]
    wire = run(received.wire(Ceilings(1.0, 1.0)))
    assert wire == Wire(0.2, wire.how)
    rates = Ceilings(CASE.bytes / 2.0, CASE.bytes / 4.0)
    assert run(Saved(Fleet([]), engine, [], CASE).wire(rates)).seconds == 2.0 + 2 * 4.0  # type: ignore[arg-type]
    assert run(Served(Fleet([]), CASE).wire(rates)).seconds == 2.0 + 4.0  # type: ignore[arg-type]
    assert run(Checkpointed(Fleet([]), CASE).wire(rates)).seconds == 2 * 2.0  # type: ignore[arg-type]


def test_ipc_sends_between_start_and_finish() -> None:
    said: list[str] = []
    assert run(Imported(Fleet(said), Engine(said)).deliver()) == 0.25  # type: ignore[arg-type]
    assert said == [*STANDS[:2], "send", "sent", "finish_weight_update", "resume_scheduler_async"]


def test_a_trainer_of_ipc_is_free_once_the_engine_has_died_and_the_update_is_none() -> None:
    class Dying(Engine):
        async def update_weights(self, _: Any) -> None:
            self.errored = True
            await asyncio.Event().wait()

    engine, said = Dying([]), list[str]()
    run(loaded(engine, Part({"names": []})))
    with pytest.raises(BenchmarkFailed, match="the engine has ended"):
        run(Imported(Fleet(said), engine).deliver())  # type: ignore[arg-type]
    assert "sent" in said
    with pytest.raises(RuntimeError, match="update_weights failed"):
        run(loaded(Engine([], fails="update_weights"), Part({"names": []})))


def test_ipc_handles_travel_as_vllm_packs_them_itself() -> None:
    asked: list[Any] = []
    rank = types.SimpleNamespace(ask=asked.append)
    fields = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2]], "packed": False, "tensor_sizes": None}
    Export(rank).post(types.SimpleNamespace(**fields, ipc_handles=[{"GPU": (1, b"2")}]))  # type: ignore[arg-type]
    (part,) = asked
    assert pickle.loads(base64.b64decode(part.update_info.pop("ipc_handles_pickled"))) == [{"GPU": (1, b"2")}]
    assert part.update_info == {name: value for name, value in fields.items() if value is not None}


def test_servers_bring_weights_to_the_engine_after_the_trainer_is_free() -> None:
    said: list[str] = []
    assert run(Served(Fleet(said), CASE).deliver()) == 0.25  # type: ignore[arg-type]
    assert said == ["send", "sent", "settled"]


@pytest.mark.parametrize(("version", "once"), [("2.11.0+cu130", True), ("2.13.0+cpu", False), ("3.0.1", False)])
def test_a_stager_is_made_anew_where_it_stages_but_once(version: str, once: bool) -> None:
    assert staged_once(version) is once


@pytest.mark.parametrize(("stuck", "seconds"), [(True, None), (False, 0.0)])
def test_trainers_that_a_dead_worker_holds_are_told_apart_from_those_that_go_on(
    stuck: bool, seconds: float | None
) -> None:
    found = Measured("a system", CASE, "", 1, "", steady=(Update(0.0, 0.0, 0.0, 0.02),))

    async def go(worker: int) -> Survival:
        engine, trainers = Engine([]), Fleet([], stuck=stuck)

        async def collective_rpc(_: str) -> list[int]:
            return [worker]

        async def deliver() -> float:
            if not stuck:
                trainers.done_at = 0.0
            return await trainers.send()

        engine.collective_rpc = collective_rpc  # type: ignore[method-assign, assignment]
        running: Any = types.SimpleNamespace(fleet=trainers, deliver=deliver)
        return await killed(engine, running, found, 0.2)

    with subprocess.Popen(["sleep", "60"]) as process, contextlib.ExitStack() as cleanup:
        cleanup.callback(process.kill)
        assert run(go(process.pid)) == Survival(seconds, 0.2)
        assert process.wait(10) == -9
