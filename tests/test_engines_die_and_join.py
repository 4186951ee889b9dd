# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines that are killed, come back and join late, and engines that are spread over replicas and stages."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemons import DEADLINE_S, Puppet, RunningDaemon, eventually
from engine_environment import engine_environment
from stagingd_client import Stage
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Follower
from stagingd_vllm.replicas import of_all_replicas
from stagingd_vllm.versions import EngineNotSupported
from tiny_engines import (
    OPTIONS,
    Driven,
    Trainer,
    save_checkpoints,
    save_latent_checkpoints,
)

from stagingd.errors import OutOfOrder

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPT = [1, 5, 9, 7, *range(20, 60)]
FP8 = {"quantization": "fp8_per_tensor", "worker_extension_cls": "held_extension.HeldExtension"}
Said = list[tuple[int, float]]
"""Greedy tokens with their log-probabilities."""

TRAINER = """
from safetensors.torch import load_file
from stagingd_client import Stage

def publish(version, checkpoint):
    stage.begin(version)
    for name, tensor in load_file(checkpoint).items():
        stage.put(name, tensor)
    stage.commit().wait()
"""


class DistantTrainer:
    """A trainer in a process of its own, which can end."""

    def __init__(self, puppet: Puppet, stage: str, socket: Path, checkpoints: list[Path]) -> None:
        self.puppet = puppet
        self.weights = [str(checkpoint / "model.safetensors") for checkpoint in checkpoints]
        puppet.do(f"stage = Stage.open({stage!r}, rank=0, ranks=1, socket={str(socket)!r}, timeout_s={DEADLINE_S})")
        puppet.do(f"stage.declare(load_file({self.weights[0]!r}))")

    def publish(self, version: int, checkpoint: int) -> None:
        self.tell_to_publish(version, checkpoint)
        self.puppet.answer()

    def tell_to_publish(self, version: int, checkpoint: int) -> None:
        self.puppet.tell(f"publish({version}, {self.weights[checkpoint - 1]!r})")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two checkpoints, and the environment of engines that run without torch.compile."""
    folder = tmp_path_factory.mktemp("engines")
    paths = save_checkpoints(folder, 2, width=384)  # FP8 kernels take multiples of 16
    with engine_environment(folder), pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_USE_AOT_COMPILE", "0")
        yield paths


@pytest.fixture(scope="module")
def replicas(checkpoints: list[Path]) -> Iterator[Driven]:
    """Two replicas of an engine that runs the first checkpoint."""
    driven = Driven(checkpoints[0], data_parallel_size=2)
    yield driven
    driven.close()


@contextmanager
def engine(checkpoint: Path, **options: Any) -> Iterator[Any]:
    """An engine that was started from a checkpoint; what it leaves behind when it is killed is cleared away."""
    ranks = options.get("pipeline_parallel_size", 1) * options.get("tensor_parallel_size", 1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(rank % 2) for rank in range(ranks)))
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # only workers are processes of their own
        llm = vllm.LLM(str(checkpoint), distributed_executor_backend="mp", **OPTIONS | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=DEADLINE_S)


def sampling() -> Any:
    return vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True)


def said(output: Any) -> Said:
    completion = output.outputs[0]
    return [(token, step[token].logprob) for token, step in zip(completion.token_ids, completion.logprobs, strict=True)]


def generated(llm: Any) -> Said:
    """One prompt alone: activations share a scale with their batch."""
    llm.reset_prefix_cache()
    return said(llm.generate([{"prompt_token_ids": PROMPT}], sampling(), use_tqdm=False)[0])


async def generated_by_both(llm: Any, name: str) -> list[Said]:
    """What each replica generates."""
    await llm.reset_prefix_cache()
    answers = []
    for rank in (0, 1):
        prompt = {"prompt_token_ids": PROMPT}
        async for output in llm.generate(prompt, sampling(), f"{name}-{rank}", data_parallel_rank=rank):
            last = output
        answers.append(said(last))
    return answers


def attach(llm: Any, stage: str, daemon: RunningDaemon) -> list[dict[str, Any]]:
    return checked(llm.collective_rpc("stagingd_attach", kwargs={"stage": stage, "socket": str(daemon.socket)}))


def update(llm: Any, **kwargs: Any) -> list[int]:
    return [answer["version"] for answer in checked(llm.collective_rpc("stagingd_update", kwargs=kwargs))]


def arrived(gate: Path) -> Any:
    """Who says at a named pipe that it has come: its pid, without waiting for more than a deadline."""
    descriptor = os.open(gate, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as pipe:
        yield
        watch = select.poll()
        watch.register(pipe, select.POLLIN)
        assert watch.poll(DEADLINE_S * 1000), "nobody came"
        yield int(pipe.read(32))


def kill_within_an_update(llm: Any, daemon: RunningDaemon, trainer: DistantTrainer, gate: Path) -> None:
    """Version 2 is half read when the worker dies; the trainer, who waits for its slot, goes on."""
    os.mkfifo(gate)
    coming = arrived(gate)
    next(coming)
    llm.collective_rpc("stagingd_hold", kwargs={"gate": str(gate)})
    with ThreadPoolExecutor(1) as pool:
        doomed = pool.submit(update, llm, version=2)
        worker = next(coming)
        (lease,) = daemon.stage("mortal").leases
        assert (lease.engine, lease.version) == ("engine", 2)
        trainer.publish(3, 1)
        trainer.tell_to_publish(4, 2)
        eventually(lambda: daemon.stage("mortal").waiting, "the trainer to wait for the slot of version 2")
        os.kill(worker, signal.SIGKILL)
        trainer.puppet.answer()  # long before a lease is over
        with pytest.raises(Exception, match=r"cancelled|died"):
            doomed.result(DEADLINE_S)
    assert not daemon.stage("mortal").leases
    assert daemon.stage("mortal").slots[0].version == 4 or daemon.stage("mortal").slots[1].version == 4


def kill(llm: Any) -> None:
    """SIGKILL for the worker of an engine that rests."""
    (worker,) = llm.collective_rpc("stagingd_pid")
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(worker), "the worker to be gone")


def test_engines_that_die_or_come_late_catch_up_and_hold_nobody_up(
    daemon: RunningDaemon, checkpoints: list[Path], tmp_path: Path
) -> None:
    with Puppet(TRAINER) as puppet:
        trainer = DistantTrainer(puppet, "mortal", daemon.socket, checkpoints)
        trainer.publish(1, 1)
        with engine(checkpoints[1], **FP8) as llm:
            second = generated(llm)
            attach(llm, "mortal", daemon)
            assert update(llm) == [1]
            first = generated(llm)
            assert first != second
            trainer.publish(2, 2)
            kill_within_an_update(llm, daemon, trainer, tmp_path / "gate")

        with engine(checkpoints[0], **FP8) as llm:
            assert generated(llm) == first
            attach(llm, "mortal", daemon)
            assert update(llm) == [4]
            assert generated(llm) == second
            kill(llm)
        trainer.publish(5, 1)

    with engine(checkpoints[1], **FP8) as llm:
        assert generated(llm) == second
        eventually(lambda: not daemon.stage("mortal").trainers, "the trainer to be gone")
        attach(llm, "mortal", daemon)
        assert update(llm) == [5]
        assert generated(llm) == first


def test_both_data_parallel_replicas_take_versions(
    replicas: Driven, daemon: RunningDaemon, checkpoints: list[Path]
) -> None:
    async def follow(llm: Any, trainer: Trainer) -> None:
        first = await generated_by_both(llm, "first")
        assert first[0] == first[1]
        await of_all_replicas(llm, "stagingd_attach", stage="replicated", socket=str(daemon.socket))
        assert daemon.stage("replicated").engines == ("engine", "engine-dp1")
        trainer.publish(2, 2)
        updated = checked(await of_all_replicas(llm, "stagingd_update"))
        assert [answer["version"] for answer in updated] == [2, 2]
        second = await generated_by_both(llm, "second")
        assert second[0] == second[1] != first[0]
        for version in (3, 4, 5):
            trainer.publish(version, 1 + version % 2)
        trainer.publish(6, 1)
        await llm.collective_rpc("stagingd_update")
        assert await of_all_replicas(llm, "stagingd_version") == [6, 6]
        assert await generated_by_both(llm, "third") == first
        await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[1])})
        assert await generated_by_both(llm, "reloaded") == second
        with pytest.raises(OutOfOrder, match="attached to a stage already"):
            await Follower(llm, "replicated", socket=daemon.socket).__aenter__()
        assert await of_all_replicas(llm, "stagingd_version") == [None, None]  # another has loaded since
        assert daemon.stage("replicated").engines == ("engine", "engine-dp1")
        await llm.collective_rpc("stagingd_detach")
        with pytest.raises(EngineNotSupported, match=r"replicas \(engine-dp1\), and vLLM answers for the first alone"):
            await Follower(llm, "replicated", socket=daemon.socket).__aenter__()
        assert daemon.stage("replicated").engines == ()

    with Stage.open("replicated", rank=0, ranks=1, socket=daemon.socket) as stage:
        replicas.do(follow(replicas.llm, Trainer(stage, checkpoints)))


def test_latent_attention_over_two_pipeline_stages_takes_versions(
    daemon: RunningDaemon, checkpoints: list[Path], tmp_path: Path
) -> None:
    """Not eager: without its first run vLLM's CPU engine has no room for what comes from the stage before."""
    latent = save_latent_checkpoints(tmp_path, 2)
    with (
        Stage.open("latent", rank=0, ranks=1, socket=daemon.socket) as stage,
        engine(latent[1], pipeline_parallel_size=2, enforce_eager=False, attention_backend="CPU_MLA", **FP8) as llm,
    ):
        trainer = Trainer(stage, latent)
        loaded = generated(llm)
        summaries = attach(llm, "latent", daemon)
        assert [(summary["rank"], summary["ranks"]) for summary in summaries] == [(0, 2), (1, 2)]
        assert update(llm) == [1, 1]
        updated = generated(llm)
        trainer.publish(2, 2)
        assert update(llm) == [2, 2]
        assert generated(llm) == loaded != updated
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(latent[0])})
        assert generated(llm) == updated
