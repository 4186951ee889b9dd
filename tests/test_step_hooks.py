# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A step is told of once, before the model computes it, by whichever way a runner has it computed."""

from __future__ import annotations

import pytest
import torch
from stagingd_vllm.beside import paced
from stagingd_vllm.carriers import copy_engine
from stagingd_vllm.step_hooks import watch

GPU = torch.device("cuda", 0)


class Model(torch.nn.Module):
    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.told = told

    def forward(self) -> str:
        self.told.append("computed")
        return "output"


class CallingRunner:
    """Like vLLM's runner with ``_model_forward``."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def _model_forward(self) -> object:
        return self.model()

    def step(self) -> object:
        return self._model_forward()


class Manager:
    """Has graphs."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def run_fullgraph(self, size: int) -> str:
        self.model.told.append(f"replayed for {size}")
        return "output"

    def run_pw_graph(self, model: Model) -> object:
        return model()


class ReplayingRunner:
    """Like vLLM's runner with a ``cudagraph_manager``."""

    def __init__(self, model: Model, *, graphs: bool = True) -> None:
        self.model = model
        self.cudagraph_manager = Manager(model) if graphs else None

    def step(self, how: str) -> object:
        if how == "whole graph" and self.cudagraph_manager:
            return self.cudagraph_manager.run_fullgraph(8)
        if how == "pieces" and self.cudagraph_manager:
            return self.cudagraph_manager.run_pw_graph(self.model)
        return self.model()


def test_a_runner_that_calls_the_model_tells_of_each_step() -> None:
    told = list[str]()
    runner = CallingRunner(Model(told))
    unwatch = watch(runner, runner.model, lambda: told.append("began"))
    assert unwatch is not None
    assert [runner.step(), runner.step()] == ["output"] * 2
    assert told == ["began", "computed"] * 2
    unwatch()
    runner.step()
    assert told[4:] == ["computed"]
    assert "_model_forward" not in vars(runner)


def test_a_runner_that_replays_graphs_tells_of_each_step_once() -> None:
    told = list[str]()
    runner = ReplayingRunner(Model(told))
    unwatch = watch(runner, runner.model, lambda: told.append("began"))
    assert unwatch is not None
    assert [runner.step(how) for how in ("whole graph", "pieces", "no graph")] == ["output"] * 3
    assert told == ["began", "replayed for 8", "began", "computed", "began", "computed"]
    unwatch()
    for how in ("whole graph", "pieces", "no graph"):
        runner.step(how)
    assert told[6:] == ["replayed for 8", "computed", "computed"]


def test_a_runner_that_has_no_graphs_tells_of_each_step() -> None:
    told = list[str]()
    runner = ReplayingRunner(Model(told), graphs=False)
    assert watch(runner, runner.model, lambda: told.append("began")) is not None
    assert runner.step("whole graph") == "output"
    assert told == ["began", "computed"]


def test_two_who_watch_one_runner_do_not_take_each_others_place() -> None:
    told = list[str]()
    runner = CallingRunner(Model(told))
    watch(runner, runner.model, lambda: told.append("one"))
    unwatch = watch(runner, runner.model, lambda: told.append("other"))
    assert unwatch is not None
    runner.step()
    unwatch()
    runner.step()
    assert told == ["other", "one", "computed", "one", "computed"]


def test_a_runner_of_another_kind_is_not_watched() -> None:
    assert watch(object(), Model([]), lambda: None) is None


def test_on_a_cpu_there_is_no_copy_engine() -> None:
    cpu = torch.device("cpu")
    assert copy_engine(cpu) is None
    assert paced(None, CallingRunner(Model([])), Model([]), cpu) is None


@pytest.mark.gpu
def test_where_steps_cannot_be_told_a_kernel_reads_the_slot_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for runner, said in ((None, "not given"), (object(), "object")):
        assert paced(copy_engine(GPU), runner, Model([]), GPU) is None
        assert f"runner ({said}) cannot be told" in caplog.text


@pytest.mark.gpu
def test_on_a_gpu_versions_cross_at_the_pace_of_the_steps() -> None:
    runner = CallingRunner(Model([]))
    through = paced(copy_engine(GPU), runner, runner.model, GPU)
    assert through is not None
    with through.at_work():
        for _ in range(3):
            runner.step()
        inputs = through.pace.admit(0.0)
        assert inputs is not None
        inputs.wait()
        assert inputs.reached
    through.close()
    assert "_model_forward" not in vars(runner)
