# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A thread that reads versions: what it tells of them, and that nobody waits for it without end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from types import TracebackType

import pytest
from stagingd_vllm import prefetcher as module
from stagingd_vllm.prefetcher import Prefetcher

from stagingd.errors import DeadlineExceeded, InternalError, LeaseLost, OutOfOrder, VersionNotAvailable

LONG_S = 30.0


class Lease:
    """A version that was lost, or not."""

    def __init__(self, version: int, lost: bool) -> None:
        self.version = version
        self._lost = lost

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lost:
            raise LeaseLost("gone", remedy="again")


class Stage:
    """Has one version, or none yet."""

    def __init__(self, version: int | None = 7, lost: bool = False) -> None:
        self.version = version
        self.asked: list[float] = []
        self._lost = lost

    def lease(self, *, version: int | None, newer_than: int | None, early: bool, timeout_s: float) -> Lease:
        self.asked.append(timeout_s)
        if self.version is None:
            raise DeadlineExceeded("no version", remedy="wait")
        if version not in (None, self.version):
            raise VersionNotAvailable("replaced", remedy="another")
        return Lease(self.version, self._lost)


class Writing:
    """Writes when it is let."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.versions: list[int] = []

    def __call__(self, lease: Lease) -> None:
        self.begun.set()
        assert self.go_on.wait(LONG_S)
        self.versions.append(lease.version)


@pytest.fixture
def writing() -> Iterator[Writing]:
    made = Writing()
    yield made
    made.go_on.set()


def started(stage: Stage, writing: Writing, *, version: int | None = None, timeout_s: float = LONG_S) -> Prefetcher:
    prefetcher = Prefetcher(stage, writing)  # type: ignore[arg-type]
    prefetcher.start(version=version, newer_than=None, early=False, timeout_s=timeout_s)
    return prefetcher


def test_a_version_is_there_once_it_is_written_and_not_before(writing: Writing) -> None:
    prefetcher = started(Stage(), writing)
    assert writing.begun.wait(LONG_S)
    assert prefetcher.reading
    assert prefetcher.version() is None
    writing.go_on.set()
    assert prefetcher.version(LONG_S) == 7
    assert not prefetcher.reading
    assert writing.versions == [7]


def test_nothing_is_there_before_it_was_asked_for_and_after_it_was_forgotten(writing: Writing) -> None:
    assert Prefetcher(Stage(), writing).version() is None  # type: ignore[arg-type]
    prefetcher = started(Stage(), writing)
    writing.go_on.set()
    assert prefetcher.version(LONG_S) == 7
    prefetcher.forget()
    assert prefetcher.version() is None


def test_one_version_is_read_at_a_time(writing: Writing) -> None:
    prefetcher = started(Stage(), writing)
    for refused in (
        lambda: prefetcher.start(version=None, newer_than=None, early=False, timeout_s=1.0),
        prefetcher.forget,
    ):
        with pytest.raises(OutOfOrder, match="being prefetched"):
            refused()


@pytest.mark.parametrize(
    ("stage", "version", "error"),
    [(Stage(), 6, VersionNotAvailable), (Stage(lost=True), None, LeaseLost), (Stage(None), None, DeadlineExceeded)],
)
def test_what_kept_it_from_being_read_is_told_again_and_again_until_the_next_is_asked_for(
    writing: Writing, stage: Stage, version: int | None, error: type[Exception]
) -> None:
    writing.go_on.set()
    prefetcher = started(stage, writing, version=version, timeout_s=0.001)
    for _ in range(2):
        with pytest.raises(error):
            prefetcher.version(LONG_S)
    stage.version, stage._lost = 8, False
    prefetcher.start(version=None, newer_than=None, early=False, timeout_s=LONG_S)
    assert prefetcher.version(LONG_S) == 8


def test_it_leaves_a_version_that_does_not_come(writing: Writing) -> None:
    stage = Stage(None)
    prefetcher = started(stage, writing)
    prefetcher.close(LONG_S)
    assert not prefetcher.reading
    assert max(stage.asked) < 1


def test_whoever_leaves_waits_for_what_is_being_written_and_not_without_end(writing: Writing) -> None:
    prefetcher = started(Stage(), writing)
    assert writing.begun.wait(LONG_S)
    with pytest.raises(DeadlineExceeded, match="still being read"):
        prefetcher.close(0.01)
    writing.go_on.set()
    prefetcher.close(LONG_S)


class Later(Stage):
    """Has a version when it is told to; ``waited`` is set once somebody waits for it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.waited = threading.Event()

    def lease(self, *, version: int | None, newer_than: int | None, early: bool, timeout_s: float) -> Lease:
        self.waited.set()
        if version is None and newer_than is not None:
            raise DeadlineExceeded("none that is newer", remedy="wait")
        return super().lease(version=version, newer_than=newer_than, early=early, timeout_s=timeout_s)


def test_a_version_that_is_only_waited_for_makes_way_for_another(writing: Writing) -> None:
    stage = Later()
    prefetcher = Prefetcher(stage, writing)  # type: ignore[arg-type]
    prefetcher.start(version=None, newer_than=9, early=False, timeout_s=LONG_S)
    assert stage.waited.wait(LONG_S)
    assert not prefetcher.reading
    stage.version = 9
    prefetcher.start(version=9, newer_than=None, early=False, timeout_s=LONG_S)
    writing.go_on.set()
    assert prefetcher.version(LONG_S) == 9
    assert writing.versions == [9]


class Slow(Lease):
    """Of a version that is to be read when ``go_on`` is set."""

    def __init__(self, given_back: list[int], leased: threading.Event, go_on: threading.Event) -> None:
        super().__init__(5, False)
        self._given_back, self._leased, self._go_on = given_back, leased, go_on

    def __enter__(self) -> Lease:
        self._leased.set()
        assert self._go_on.wait(LONG_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._given_back.append(self.version)


class Leasing:
    """Leases what is slow to be leased; ``leased`` tells who has leased, in turn."""

    def __init__(self) -> None:
        self.leased, self.go_on = [threading.Event(), threading.Event()], threading.Event()
        self.given_back: list[int] = []
        self._turns = iter(self.leased)

    def lease(self, **_: object) -> Lease:
        return Slow(self.given_back, next(self._turns), self.go_on)


def test_one_that_is_leased_when_nobody_wants_it_any_more_is_given_back_unread(writing: Writing) -> None:
    stage = Leasing()
    prefetcher = started(stage, writing)  # type: ignore[arg-type]
    assert stage.leased[0].wait(LONG_S)
    assert not prefetcher.reading
    prefetcher.forget()
    assert prefetcher.version() is None
    prefetcher.start(version=None, newer_than=None, early=False, timeout_s=LONG_S)
    assert not stage.leased[1].wait(0.05), "the reader is that of whoever was forgotten, until it has given back"
    stage.go_on.set()
    writing.go_on.set()
    assert prefetcher.version(LONG_S) == 5
    assert writing.versions == [5]
    assert stage.given_back == [5, 5]


def test_what_nobody_foresaw_is_told_as_an_error_that_can_be_lived_with(writing: Writing) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    prefetcher = Prefetcher(Stage(), fail)  # type: ignore[arg-type]
    prefetcher.start(version=None, newer_than=None, early=False, timeout_s=LONG_S)
    for _ in range(2):
        with pytest.raises(InternalError, match="CUDA out of memory"):
            prefetcher.version(LONG_S)


def test_a_version_that_is_there_right_after_the_wait_is_there() -> None:
    class Late(Future[int]):
        def result(self, timeout: float | None = None) -> int:
            try:
                return super().result(timeout)
            finally:
                if not self.done():
                    self.set_result(7)

    prefetcher = Prefetcher(None, None)  # type: ignore[arg-type]
    prefetcher._request = module._Request(module._Wanted(None, None, False), 0.0)
    prefetcher._request.outcome = Late()
    assert prefetcher.version() == 7


def test_one_that_has_given_up_waiting_for_its_turn_does_not_let_the_next_in(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_S", 0.0)
    monkeypatch.setattr(module, "GIVING_UP_S", 0.01)
    stage = Leasing()
    prefetcher = started(stage, writing)  # type: ignore[arg-type]
    assert stage.leased[0].wait(LONG_S)
    for _ in range(2):
        prefetcher.start(version=None, newer_than=None, early=False, timeout_s=LONG_S)
        with pytest.raises(DeadlineExceeded, match="still being read, or asked for"):
            prefetcher.version(LONG_S)
    with pytest.raises(DeadlineExceeded, match="still being read, or asked for"), prefetcher.aside():
        pass
    assert not stage.leased[1].is_set()
    stage.go_on.set()


def test_whoever_stands_aside_waits_for_one_that_was_forgotten_and_does_not_ask_again(writing: Writing) -> None:
    stage = Leasing()
    prefetcher = started(stage, writing)  # type: ignore[arg-type]
    assert stage.leased[0].wait(LONG_S)
    prefetcher.forget()
    stage.go_on.set()
    with prefetcher.aside():
        assert stage.given_back == [5], "the reader is the caller's"
    prefetcher.close(LONG_S)
    assert prefetcher.version() is None
    assert writing.versions == []
    assert not stage.leased[1].is_set()


def test_what_is_waited_for_stands_aside_and_is_waited_for_again(writing: Writing) -> None:
    stage = Later()
    prefetcher = started(stage, writing)
    assert stage.waited.wait(LONG_S)
    with prefetcher.aside():
        asked = len(stage.asked)
        stage.version = 11
        assert len(stage.asked) == asked, "the reader is the caller's"
    writing.go_on.set()
    assert prefetcher.version(LONG_S) == 11


def test_nobody_stands_aside_who_reads(writing: Writing) -> None:
    prefetcher = started(Stage(), writing)
    assert writing.begun.wait(LONG_S)
    with pytest.raises(OutOfOrder, match="being prefetched"), prefetcher.aside():
        pass
    writing.go_on.set()
    assert prefetcher.version(LONG_S) == 7
    with prefetcher.aside():
        pass
    assert prefetcher.version() == 7, "what is there stays there"


def test_a_reader_that_does_not_come_back_is_told_of_as_what_it_is(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_S", 0.0)
    monkeypatch.setattr(module, "GIVING_UP_S", 0.01)
    stage, go_on = Later(), threading.Event()

    def stuck(**_: object) -> Lease:
        stage.waited.set()
        assert go_on.wait(LONG_S)
        return Lease(5, False)

    stage.lease = stuck  # type: ignore[method-assign]
    prefetcher = started(stage, writing)
    assert stage.waited.wait(LONG_S)
    prefetcher.start(version=None, newer_than=None, early=False, timeout_s=LONG_S)
    with pytest.raises(DeadlineExceeded, match="still being read, or asked for"):
        prefetcher.version(LONG_S)
    go_on.set()
