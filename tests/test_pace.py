# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How much may cross in each step of an engine, and what happens while it makes none."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stagingd_vllm.pace import IDLE_S, SHARE, Pace, Step, Steps

LONG_S = 30.0
STEP_S = 0.005


class Engine:
    """Begins its next step when one waits for it, unless it is idle; ``waits`` are the seconds that one would."""

    def __init__(self, seconds: Iterable[float] = itertools.repeat(STEP_S)) -> None:
        self._seconds = iter(seconds)
        self._newest: Step[int] | None = None
        self.idle = False
        self.waits: list[float] = []

    def step(self) -> None:
        number = self._newest.number + 1 if self._newest else 1
        self._newest = Step(number, number, next(self._seconds))

    def after(self, number: int, timeout_s: float) -> Step[int] | None:
        if timeout_s and not self.idle:
            self.step()
        elif timeout_s:
            self.waits.append(timeout_s)
        return self._newest if self._newest and self._newest.number > number else None


def generating() -> tuple[Engine, Pace[int]]:
    """An engine in its first steps, and a pace that has seen them."""
    engine = Engine()
    pace = Pace(engine)  # type: ignore[arg-type]
    engine.step()
    assert pace.admit(0.0) == 1
    return engine, pace


@given(st.lists(st.floats(1e-6, 0.9 * SHARE * STEP_S), min_size=1, max_size=200))
def test_what_crosses_in_a_step_exceeds_its_share_by_less_than_one_copy(copies: list[float]) -> None:
    _, pace = generating()
    within = list[float]()
    for seconds in copies:
        if pace.admit(seconds) is not None:
            within = []
        within.append(seconds)
        assert sum(within[:-1]) < SHARE * STEP_S
        assert not pace.idle


@given(st.lists(st.floats(1e-6, 10 * STEP_S), min_size=1, max_size=100))
def test_in_the_long_run_copies_keep_to_their_share_however_long_each_is(copies: list[float]) -> None:
    _, pace = generating()
    step = 1
    for number, seconds in enumerate(copies):
        step = pace.admit(seconds) or step
        before = sum(copies[:number])
        assert before <= step * SHARE * STEP_S + 1e-9


def test_a_copy_waits_for_the_inputs_of_the_step_that_it_crosses_in() -> None:
    engine, pace = generating()
    assert pace.admit(SHARE * STEP_S / 4) is None, "of the step before nothing has to be waited for twice"
    engine.step()
    assert pace.admit(SHARE * STEP_S / 4) == 2
    assert pace.admit(2 * SHARE * STEP_S) is None
    assert pace.admit(SHARE * STEP_S) == 4, "the second step's share was passed, and the third's made up for it"


def test_what_is_left_of_a_step_is_not_taken_in_the_next() -> None:
    engine, pace = generating()
    for _ in range(10):
        engine.step()
    assert pace.admit(SHARE * STEP_S) == 11
    assert pace.admit(SHARE * STEP_S) == 12


def test_an_idle_engine_is_waited_for_once() -> None:
    engine, pace = generating()
    engine.idle = True
    assert pace.admit(SHARE * STEP_S) is None
    assert not pace.idle
    for _ in range(10):
        assert pace.admit(SHARE * STEP_S) is None
        assert pace.idle
    assert engine.waits == [IDLE_S]
    engine.step()
    assert pace.admit(0.0) == 2
    assert not pace.idle


def test_before_the_first_step_nobody_is_in_the_way() -> None:
    pace: Pace[int] = Pace(Engine())  # type: ignore[arg-type]
    assert pace.admit(1.0) is None
    assert pace.idle


def test_of_a_step_that_was_watched_before_nothing_is_left() -> None:
    steps = Steps(lambda: "inputs", ticking(1.0, 1.25, 1.5, 99.0))
    pace = Pace(steps)
    with pace.watching():
        for _ in range(3):
            steps.began()
        assert pace.admit(SHARE * 0.1) == "inputs"
    with pace.watching():
        assert pace.admit(SHARE * 0.1) is None
        assert pace.idle


def test_a_watch_that_begins_between_two_steps_waits_for_the_next() -> None:
    steps = Steps(lambda: "inputs", ticking(1.0, 1.25, 1.5, 1.7, 1.75))
    pace = Pace(steps)
    for _ in range(3):
        steps.began()
    with pace.watching():
        assert not pace.idle
        steps.began()
        assert pace.admit(SHARE * 0.25) == "inputs", "what a step takes is known from before"


def test_slow_steps_are_waited_for_longer() -> None:
    engine = Engine(itertools.repeat(1.0))
    pace: Pace[int] = Pace(engine)  # type: ignore[arg-type]
    engine.step()
    assert pace.admit(SHARE) == 1
    engine.idle = True
    assert pace.admit(SHARE) is None
    assert engine.waits == [2.0]


def ticking(*times: float) -> Callable[[], float]:
    return iter(times).__next__


def test_a_step_takes_what_those_before_it_took() -> None:
    marks = itertools.count(1)
    steps = Steps(marks.__next__, ticking(1.0, 1.25, 1.5, 2.4))
    with steps.watched():
        steps.began()
        assert steps.after(0, 0.0) == Step(1, 1, 0.0)
        for _ in range(3):
            steps.began()
        assert steps.after(1, 0.0) == Step(4, 4, 0.25), "the one that took longer is an exception"
        assert steps.after(4, 0.0) is None


def test_nothing_is_marked_while_nobody_watches() -> None:
    marks = itertools.count(1)
    steps = Steps(marks.__next__)
    steps.began()
    with steps.watched():
        pass
    steps.began()
    assert next(marks) == 1


def test_the_time_that_an_engine_was_idle_is_not_a_steps() -> None:
    steps = Steps(lambda: None, ticking(1.0, 50.0, 50.5))
    with steps.watched():
        for _ in range(3):
            steps.began()
    newest = steps.after(0, 0.0)
    assert newest is not None
    assert newest.seconds == 0.5


@pytest.mark.timeout(LONG_S)
def test_who_waits_for_a_step_is_woken_by_it() -> None:
    steps = Steps(lambda: "inputs")
    with steps.watched():
        found = list[Step[str] | None]()
        thread = threading.Thread(target=lambda: found.append(steps.after(0, LONG_S)))
        thread.start()
        steps.began()
        thread.join(LONG_S)
    assert found == [Step(1, "inputs", 0.0)]
