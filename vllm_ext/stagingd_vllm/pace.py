# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""When bytes may cross to a device that generates: within each step, once its inputs are there, and not to its end.

A device's copy engine takes copies in their order, whosever they are. A step begins with small copies of its inputs;
behind what is prefetched they would wait, and the device with them. So no more is handed to it in each step than it
brings over before the next one begins.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

SHARE: Final = 0.6
"""Of a step's time. With more, what is late reaches the next step's inputs."""
IDLE_S: Final = 0.02
"""Without a new step for so long, in seconds, or for twice the usual time of one, nobody is in the way."""
LONGEST_S: Final = 1.0
"""What lies further apart, in seconds, says nothing of the time that steps take."""
REMEMBERED: Final = 8

Mark = TypeVar("Mark")
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Step(Generic[Mark]):
    """A step of an engine.

    Attributes:
        number: how many have begun before while steps were watched, and this one.
        inputs: reached when its inputs are on the device.
        seconds: what a step takes, by those before it; 0 where there were none.
    """

    number: int
    inputs: Mark
    seconds: float


class Steps(Generic[Mark]):
    """The steps of an engine, as the thread that runs it tells them to another, which watches now and then.

    Args:
        mark: marks the point that the device has reached when it has done all that it was given so far.
        clock: seconds.
    """

    def __init__(self, mark: Callable[[], Mark], clock: Clock = time.perf_counter) -> None:
        self._mark = mark
        self._clock = clock
        self._watched = False
        self._newest: Step[Mark] | None = None
        self._number = 0
        self._begun = threading.Condition()
        self._times: deque[float] = deque(maxlen=REMEMBERED)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it is open, steps are marked."""
        self._newest = None
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    @property
    def quiet(self) -> bool:
        """Whether no step has begun for longer than they usually take."""
        times = list(self._times)
        return not times or self._clock() - times[-1] > patience(_usual(times))

    def began(self) -> None:
        """A step's inputs have been handed to the device, and its computations not yet."""
        now = self._clock()
        if self._times and now - self._times[-1] > LONGEST_S:
            self._times.clear()
        self._times.append(now)
        if not self._watched:
            return
        mark, seconds = self._mark(), _usual(list(self._times))
        with self._begun:
            self._number += 1
            self._newest = Step(self._number, mark, seconds)
            self._begun.notify_all()

    def after(self, number: int, timeout_s: float) -> Step[Mark] | None:
        """The newest step, if it is later than one; None if there is none within so many seconds."""
        with self._begun:
            there = self._begun.wait_for(lambda: self._newest is not None and self._newest.number > number, timeout_s)
            return self._newest if there else None


def _usual(times: list[float]) -> float:
    """Seconds from one step to the next; 0 where there are none."""
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    return statistics.median(seconds) if seconds else 0.0


def patience(usual: float) -> float:
    """How long the next step may let wait until nobody is in the way, given what one takes; both in seconds."""
    return max(IDLE_S, 2 * usual)


class Pace(Generic[Mark]):
    """Admits copies, one after another.

    Args:
        steps: of the engine.
        share: of a step's time that copies may take.
    """

    def __init__(self, steps: Steps[Mark], share: float = SHARE) -> None:
        self._steps = steps
        self._share = share
        self._seen = 0
        self._left = 0.0
        self._usual = 0.0
        self.idle = True
        """Whether nobody is in the way; then no more than a little may be on its way at a time."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is open, the engine's steps are watched, and copies may be admitted."""
        self._left, self.idle = 0.0, self._steps.quiet
        with self._steps.watched():
            yield

    def admit(self, seconds: float) -> Mark | None:
        """Wait until a copy may be handed to the device.

        Args:
            seconds: what it takes. More than there is left of a step is taken from the next one's share.

        Returns:
            What the device has to reach before; None if that is nothing that it was not told before.
        """
        while True:
            step = self._steps.after(self._seen, self._patience())
            if step is None:
                self.idle = self._left <= 0
                self._left = 0.0 if self.idle else self._left - seconds
                return None
            self._seen, self._usual, self.idle = step.number, step.seconds, False
            self._left = min(self._left, 0.0) + self._share * step.seconds
            if self._left > 0:
                self._left -= seconds
                return step.inputs

    def _patience(self) -> float:
        """How long a step is waited for before the next copy, in seconds."""
        return 0.0 if self.idle or self._left > 0 else patience(self._usual)
