# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Doom: the product's functions, wrapped from outside, so that SIGKILL comes at a point and nowhere else.

The product knows nothing of it. A process wraps its own copy of the functions, and is killed when it comes by;
or it kills the daemon then, and goes on.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from stagingd_client import flush
from stagingd_client.flush import Flusher
from stagingd_client.stage import Stage

from crashes.points import (
    Asked,
    Called,
    Changed,
    Copied,
    Handled,
    Moment,
    Point,
    Reconnected,
    Torn,
    Viewed,
    Written,
)
from crashes.waiting import DEADLINE_S, until
from stagingd import wire
from stagingd.buffer import DoubleBuffer
from stagingd.connection import Connection
from stagingd.errors import MessageRefused
from stagingd.ledger import OVERHEAD, Ledger
from stagingd.link import Link
from stagingd.liveness import Process
from stagingd.service import Service

Function = Callable[..., Any]

MILLISECONDS: Final = 1000


@dataclass
class Doom:
    """What is to happen at a point.

    Args:
        point: where.
        announce: called with the point's name right before the end, so that others know that it was there.
        victim: whose end; this process's own by default.
    """

    point: Point
    announce: Callable[[str], None]
    victim: int | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _struck: bool = False

    def strike(self) -> None:
        """SIGKILL, once. Returns only when another process was meant, which is dead then."""
        if self._struck:
            return
        self._struck = True
        self.lift()
        self.announce(self.point.id)
        if self.victim is None:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        else:
            with Process(self.victim) as victim:
                os.kill(self.victim, signal.SIGKILL)
                until(lambda: victim.ended, "the daemon to die")

    def wrap(self, owner: Any, name: str, make: Callable[[Function], Function]) -> None:
        """Put what ``make`` makes of a function in its place."""
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._undo.append(lambda: setattr(owner, name, original))

    def lift(self) -> None:
        """Take all wrappers off again."""
        while self._undo:
            self._undo.pop()()

    def passage(self, tensor: str, moment: Moment) -> None:
        """A reader comes by."""
        if self.point.hook == Viewed(tensor) and self.point.moment is moment:
            self.strike()

    def set(self) -> None:
        """Wrap what the point needs."""
        match self.point.hook:
            case Asked() as hook:
                _set_asked(self, hook)
            case Copied() as hook:
                _set_copied(self, hook)
            case Reconnected():
                _set_reconnected(self)
            case Handled() as hook:
                _set_handled(self, hook)
            case Changed() as hook:
                _set_changed(self, hook)
            case Called() as hook:
                _set_called(self, hook)
            case Torn() | Written() as hook:
                _set_after_return(self, hook)
            case Viewed():
                pass  # readers call ``passage``


def named(function: str) -> tuple[Any, str]:
    """Owner and name of a function that is written as ``module:Class.name``."""
    module, _, path = function.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, name


# In clients


def _set_asked(doom: Doom, hook: Asked) -> None:
    links: set[Link] = set()

    def asking(ask: Function) -> Function:
        def wrapped(self: Connection, link: Link, message: wire.Request, deadline: float) -> wire.Answer:
            if message.kind != hook.kind or hook.version not in (None, getattr(message, "version", None)):
                untouched: wire.Answer = ask(self, link, message, deadline)
                return untouched
            if doom.point.moment is Moment.BEFORE:
                doom.strike()
            links.add(link)
            answer: wire.Answer = ask(self, link, message, deadline)
            doom.strike()
            return answer

        return wrapped

    def awaiting(wait: Function) -> Function:
        def wrapped(self: Link, event: int, deadline: float, what: str) -> None:
            if self in links and what.startswith("answered") and doom.point.moment is Moment.DURING:
                links.clear()
                _await_taken(self, hook)
                doom.strike()
            wait(self, event, deadline, what)

        return wrapped

    doom.wrap(Connection, "_ask", asking)
    doom.wrap(Link, "_await", awaiting)


def _await_taken(link: Link, hook: Asked) -> None:
    """Until the daemon has carried the request out: its answer is here, or its status shows it."""
    if not hook.taken:
        assert link._socket.poll(int(DEADLINE_S * MILLISECONDS)), f"no answer to {hook.kind}"
        return
    with Connection(link._path, name="doomed") as second:
        until(lambda: _shown(second.request(wire.Status(), wire.StatusReport), hook), f"{hook.kind} to be carried out")


def _shown(report: wire.StatusReport, hook: Asked) -> bool:
    """A doomed trainer is rank 1, and its stage the last that was declared."""
    stage = report.stages[-1]
    if hook.taken == "committed":
        return any(1 in slot.committed_ranks for slot in stage.slots)
    return 1 in stage.trainers


def _set_copied(doom: Doom, hook: Copied) -> None:
    """The copies of version 2 by trainer rank 1."""
    doomed: set[str] = set()
    """Threads that flush that version, while they write that tensor."""
    flushing: set[str] = set()

    def flushes(flush_batch: Function) -> Function:
        def wrapped(self: Stage, publication: Any, *args: Any) -> Any:
            if publication.version == 2 and self.rank == 1:
                flushing.add(threading.current_thread().name)
            return flush_batch(self, publication, *args)

        return wrapped

    def writing(write: Function) -> Function:
        def wrapped(self: Flusher, slot: int, owned: Any, values: Any) -> None:
            name = threading.current_thread().name
            here = name in flushing and self._catalog.tensors[owned.tensor].name == hook.tensor
            if here and doom.point.moment is Moment.BEFORE:
                doom.strike()
            if here:
                doomed.add(name)
            write(self, slot, owned, values)
            doomed.discard(name)
            if here:
                doom.strike()

        return wrapped

    def cutting(parts: Function) -> Function:
        def wrapped(box: Any, item_bytes: int) -> Any:
            if threading.current_thread().name not in doomed or doom.point.moment is not Moment.DURING or hook.moments:
                yield from parts(box, item_bytes)
                return
            half = box.lengths[0] // 2
            yield (slice(0, half),)
            doom.strike()
            yield (slice(half, box.lengths[0]),)

        return wrapped

    def storing(store: Function) -> Function:
        def wrapped(self: Flusher, *args: Any) -> None:
            if threading.current_thread().name in doomed and hook.moments:
                doom.strike()
            store(self, *args)

        return wrapped

    doom.wrap(Stage, "_flush_batch", flushes)
    doom.wrap(Flusher, "write", writing)
    doom.wrap(Flusher, "_store_moments", storing)
    doom.wrap(flush, "_parts", cutting)


def _set_reconnected(doom: Doom) -> None:
    returned = []

    def reconnecting(reconnect: Function) -> Function:
        def wrapped(self: Connection, *args: Any) -> None:
            if doom.point.moment is Moment.BEFORE:
                doom.strike()
            reconnect(self, *args)
            if doom.point.moment is Moment.DURING:
                doom.strike()
            returned.append(self)

        return wrapped

    def asking(ask: Function) -> Function:
        def wrapped(self: Connection, *args: Any) -> wire.Answer:
            answer: wire.Answer = ask(self, *args)
            if self in returned:
                doom.strike()
            return answer

        return wrapped

    doom.wrap(Connection, "_reconnect", reconnecting)
    doom.wrap(Connection, "_ask", asking)


# In the daemon


def _set_handled(doom: Doom, hook: Handled) -> None:
    wanted = {
        name: value for name in ("kind", "rank", "version", "newer_than") if (value := getattr(hook, name)) is not None
    }
    passages = 0

    def handling(take: Function) -> Function:
        def wrapped(self: Service, peer: Any, request_id: bytes, body: bytes) -> Any:
            nonlocal passages
            if _matches(body, wanted):
                passages += 1
                if passages == hook.passage:
                    _come(doom)
            return take(self, peer, request_id, body)

        return wrapped

    doom.wrap(Service, "take", handling)


def _matches(body: bytes, wanted: dict[str, object]) -> bool:
    try:
        request = wire.decode_request(body)
    except MessageRefused:
        return False
    return all(getattr(request, name, None) == value for name, value in wanted.items())


def _set_changed(doom: Doom, hook: Changed) -> None:
    def changing(change: Function) -> Function:
        def wrapped(self: DoubleBuffer, *args: Any) -> Any:
            if hook.version in (getattr(slot, "version", None) for slot in (self.filling, *args)):
                _come(doom)
            return change(self, *args)

        return wrapped

    doom.wrap(DoubleBuffer, hook.method, changing)


def _come(doom: Doom) -> None:
    """The daemon has come to the point: it ends now, or within its next ledger record, or once that is written."""
    if doom.point.moment is Moment.BEFORE:
        doom.strike()
    elif doom.point.moment is Moment.DURING:
        _tear_next_record(doom)
    else:
        _end_after_next_record(doom)


def _set_called(doom: Doom, hook: Called) -> None:
    _at_passage(doom, hook.function, hook.passage, doom.strike, leaving=hook.leaving)


def _set_after_return(doom: Doom, hook: Torn | Written) -> None:
    tear = isinstance(hook, Torn)
    then = (lambda: _tear_next_record(doom)) if tear else (lambda: _end_after_next_record(doom))
    _at_passage(doom, hook.function, hook.passage, then, leaving=True)


def _at_passage(doom: Doom, function: str, passage: int, then: Callable[[], None], *, leaving: bool) -> None:
    passages = 0

    def calling(call: Function) -> Function:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal passages
            passages += 1
            here = passages == passage
            if here and not leaving:
                then()
            result = call(*args, **options)
            if here and leaving:
                then()
            return result

        return wrapped

    doom.wrap(*named(function), calling)


def _tear_next_record(doom: Doom) -> None:
    def writing(write: Function) -> Function:
        def wrapped(self: Ledger, record: bytes) -> None:
            _write_half(write, self, record)
            doom.strike()

        return wrapped

    doom.wrap(Ledger, "write", writing)


def _end_after_next_record(doom: Doom) -> None:
    written = []

    def writing(write: Function) -> Function:
        def wrapped(self: Ledger, record: bytes) -> None:
            write(self, record)
            written.append(self)

        return wrapped

    def settling(settle: Function) -> Function:
        def wrapped(self: Service) -> Any:
            answers = settle(self)
            if written:
                doom.strike()
            return answers

        return wrapped

    doom.wrap(Ledger, "write", writing)
    doom.wrap(Service, "_settle", settling)


def _write_half(write: Function, ledger: Ledger, record: bytes) -> None:
    """The first half of the bytes that ``write`` would write."""
    whole = bytearray(b"".join(ledger._places))
    write(Ledger(memoryview(whole)), record)
    place = (ledger._sequence + 1) % 2
    at, half = place * len(whole) // 2, (OVERHEAD + len(record)) // 2
    ledger._places[place][:half] = whole[at : at + half]
