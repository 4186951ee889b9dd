# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What is hooked into a trainer's steps: when a version is published, under which number, and what the fence holds."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from daemons import RunningDaemon, eventually
from stagingd_client.naming import SameNames
from stagingd_client.torchtitan.publishing import Publishing, steps_made
from stagingd_client.torchtitan.settings import PublishingSettings
from stagingd_vllm import Reader
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stagingd.errors import DaemonUnreachable, NonFiniteValues
from stagingd.formats import Quantization, StageFormat
from stagingd.policy import Policy


class Trainer:
    """A model of one number, which every step makes one greater."""

    def __init__(self, daemon: RunningDaemon, stage: str, last_step: int | None = None, **settings: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = SGD(self.model.parameters(), lr=1.0)
        given = PublishingSettings(stage=stage, socket=daemon.socket, timeout_s=10.0, **settings)
        self.publishing = Publishing(given, SameNames(), last_step)

    def step(self, number: int | None = None) -> None:
        self.model.weight.grad = -torch.ones(1, 1)
        self.optimizer.step()
        self.publishing.after_step(self.model, number)


@contextmanager
def training(daemon: RunningDaemon, stage: str, **options: Any) -> Iterator[Trainer]:
    trainer = Trainer(daemon, stage, **options)
    try:
        yield trainer
    finally:
        trainer.publishing.close()


@contextmanager
def reading(daemon: RunningDaemon, stage: str) -> Iterator[Reader]:
    with Reader.attach(stage, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
        yield reader


def newest(daemon: RunningDaemon, stage: str, above: int | None = None) -> tuple[int, float]:
    """Number and weight of the newest version, once there is one above a given one."""
    with reading(daemon, stage) as reader, reader.lease(newer_than=above, timeout_s=10) as lease:
        return lease.version, lease.read("weight").item()


def test_every_nth_step_is_published_and_the_last(daemon: RunningDaemon, stage_name: str) -> None:
    with training(daemon, stage_name, every=3, last_step=7, policy="block") as trainer:
        found = []
        trainer.step(1)
        trainer.step(2)
        assert not daemon.status().stages or all(s.stage != stage_name for s in daemon.status().stages)
        for step in (3, 4, 5, 6):
            trainer.step(step)
            if step % 3 == 0:
                found.append(newest(daemon, stage_name, above=step - 1))
        trainer.step(7)
    assert [*found, newest(daemon, stage_name)] == [(3, 3.0), (6, 6.0), (7, 7.0)]


def test_a_trainer_that_goes_back_publishes_above_what_there_is_until_it_has_caught_up(
    daemon: RunningDaemon, stage_name: str
) -> None:
    with training(daemon, stage_name, last_step=20, policy="block") as trainer:
        trainer.step(20)
    assert newest(daemon, stage_name)[0] == 20
    with training(daemon, stage_name, every=5, last_step=30, policy="block") as trainer:
        versions = [20]
        for step in range(11, 31):
            trainer.step(step)
            if step % 5 == 0:
                versions.append(newest(daemon, stage_name, above=versions[-1])[0])
    assert versions == [20, 21, 22, 25, 30]


def test_steps_are_counted_by_the_optimizer_where_the_trainer_does_not_say_them(
    daemon: RunningDaemon, stage_name: str
) -> None:
    with training(daemon, stage_name) as trainer:
        trainer.optimizer = adam = Adam(trainer.model.parameters(), lr=0.0)
        for _ in range(41):
            trainer.model.weight.grad = torch.ones(1, 1)
            adam.step()
        trainer.step()
        trainer.step()
        assert steps_made(adam) == 43
    assert newest(daemon, stage_name)[0] == 43


def test_an_optimizer_that_does_not_count_is_counted_from_the_start_of_the_process(
    daemon: RunningDaemon, stage_name: str
) -> None:
    with training(daemon, stage_name) as trainer:
        trainer.step()
        trainer.step()
    assert newest(daemon, stage_name) == (2, 2.0)


def test_the_fence_comes_before_the_optimizers_own_hooks(daemon: RunningDaemon, stage_name: str) -> None:
    """Version 2 waits for a reader of version 1: until it is copied, no hook and no step may change a weight."""
    asked, changed = threading.Event(), threading.Event()

    def read_when_the_trainer_waits() -> None:
        asked.wait(10)
        changed.wait(0.2)  # it must not happen; if it does, before anything is copied
        with reading(daemon, stage_name) as reader, reader.lease(version=1, timeout_s=10):
            pass

    before = register_optimizer_step_pre_hook(lambda *_: asked.set())  # it runs before the fence
    with training(daemon, stage_name, policy="block") as trainer:
        trainer.step(1)
        eventually(lambda: daemon.stage(stage_name).sealed_versions == 1, "version 1")
        trainer.step(2)

        def change(*_: object) -> None:
            nn.init.constant_(trainer.model.weight, 99.0)
            changed.set()

        trainer.optimizer.register_step_pre_hook(change)
        asked.clear()
        helper = threading.Thread(target=read_when_the_trainer_waits)
        helper.start()
        trainer.optimizer.step()
        helper.join(20)
        before.remove()
        assert changed.is_set()
    assert newest(daemon, stage_name) == (2, 2.0)


def test_what_goes_wrong_with_the_last_version_is_raised_by_the_last_step(
    daemon: RunningDaemon, stage_name: str
) -> None:
    trainer = Trainer(daemon, stage_name, last_step=2)
    trainer.step(1)
    assert newest(daemon, stage_name)[0] == 1
    nn.init.constant_(trainer.model.weight, float("nan"))
    with pytest.raises(NonFiniteValues, match="weight"):
        trainer.step(2)
    assert newest(daemon, stage_name)[0] == 1


def test_after_the_last_step_nothing_is_left(daemon: RunningDaemon, stage_name: str) -> None:
    trainer = Trainer(daemon, stage_name, last_step=1)
    trainer.step(1)
    assert daemon.stage(stage_name).trainers == ()
    left = weakref.ref(trainer.publishing)
    del trainer
    gc.collect()
    assert left() is None  # neither optimizers nor the end of the process know it any more


ENDS_EARLY = """
import sys, torch
from stagingd_client.naming import SameNames
from stagingd_client.torchtitan.publishing import Publishing
from stagingd_client.torchtitan.settings import PublishingSettings
publishing = Publishing(PublishingSettings(), SameNames(), last_step=9)
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.constant_(model.weight, float(sys.argv[1]))
publishing.after_step(model, 1)
"""


@pytest.mark.parametrize(("weight", "versions", "said"), [("3", 1, ""), ("nan", 0, "NonFiniteValues")])
def test_a_run_that_ends_before_its_last_step_finishes_its_version_or_says_why_not(
    daemon: RunningDaemon, stage_name: str, weight: str, versions: int, said: str
) -> None:
    environment = {**os.environ, "STAGINGD_SOCKET": str(daemon.socket), "STAGINGD_STAGE": stage_name}
    command = [sys.executable, "-c", ENDS_EARLY, weight]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert said in run.stderr
    assert bool(said) == bool(run.stderr)
    assert daemon.stage(stage_name).sealed_versions == versions
    assert daemon.stage(stage_name).trainers == ()


def test_a_trainer_whose_settings_name_what_is_quantized_publishes_that_quantized(
    daemon: RunningDaemon, stage_name: str, tmp_path: Path
) -> None:
    file = tmp_path / "quantization.json"
    quantization = Quantization(format=StageFormat.FP8_PER_CHANNEL, device="cpu", groups=(("weight",),))
    file.write_text(quantization.model_dump_json())
    with training(daemon, stage_name, last_step=1, quantization=file) as trainer:
        trainer.step(1)
        with reading(daemon, stage_name) as reader, reader.lease() as lease:
            assert lease.read("weight").float().item() == 448.0, "one, by the scale of its row"


def test_settings_come_from_the_trainer_and_else_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGINGD_STAGE", "from-the-environment")
    monkeypatch.setenv("STAGINGD_POLICY", "block")
    monkeypatch.setenv("STAGINGD_LEASE_S", "7")  # the daemon's, not ours
    settings = PublishingSettings(stage="given")
    assert (settings.stage, settings.policy, settings.every) == ("given", Policy.BLOCK, 1)
    with pytest.raises(pydantic.ValidationError, match="evry"):
        PublishingSettings(evry=2)  # type: ignore[call-arg]


def test_without_a_daemon_the_trainer_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="stagingd serve"):
        Publishing(PublishingSettings(socket=tmp_path / "none.sock"), SameNames())
