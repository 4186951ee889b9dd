# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The points: who is killed, at which step, at which moment of it, and what must become of version 2.

In every scenario version 1 is committed and the front, and version 2 is under way: begun by both trainer ranks,
or sealed where the step comes later than that. The steps are those of the protocol, and the moments mean:

step                      before                     during                          after
------------------------- -------------------------- ------------------------------- -------------------------
a client's request:       the client has not sent    the daemon has carried it out;  the client has read the
declare, attach, begin,   it                         the answer lies unread in the   answer and done nothing
commit, lease, release,                              client's socket, or has to      since
shutdown (goodbye)                                   wait for somebody
the same in the daemon    the request has arrived,   the change is made, and half    the ledger is written, the
                          nothing was done about it  the bytes of the ledger's       answer is not sent
                                                     record are written
copy (of a tensor)        no byte of it is in the    half its elements are in the    elements and moments are
                          slot                       slot; or all of them, and its   there
                                                     moments are not
read (of a tensor)        nothing of it is read      half of it is read              all of it is read
seal                      all but the last commit    as for a request: the last commit is the one that seals
flip                      version 2 is sealed and    as for a request: the lease, or the next begin, that makes
                          not the front              version 2 the front
declare (founding, in     as for a request           the memory is allocated; it is  as for a request
the daemon)                                          whole and has no name; it has
                                                     two names; its ledger is empty
shutdown (the daemon's:   the signal has arrived,    one of its two stages is given  all stages are; its sockets
stop, hand over)          nothing was done about it  back, or let go                 are not removed
recovery (the daemon's)   the successor has looked   one of the two stages is        everything is adopted; it
                          at nothing                 adopted; or half a ledger is    cannot be spoken to yet
                                                     written again
recovery (a client's)     the client has seen the    it has said hello to the        its request, repeated, is
                          daemon's end               successor and not asked again   answered

Where the daemon takes no part in a step (copy, read) it is killed while a client is at that moment of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Final


class Role(StrEnum):
    """Who is killed."""

    TRAINER = "trainer rank"
    WORKER = "engine worker"
    DAEMON = "daemon"


class Step(StrEnum):
    """What is going on."""

    DECLARE = "declare"
    ATTACH = "attach"
    BEGIN = "begin"
    COPY = "copy"
    COMMIT = "commit"
    SEAL = "seal"
    FLIP = "flip"
    LEASE = "lease"
    READ = "read"
    RELEASE = "release"
    SHUTDOWN = "shutdown"
    RECOVERY = "recovery"


class Moment(StrEnum):
    """How far it has come; see the module's table."""

    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


class Fate(StrEnum):
    """What becomes of version 2."""

    SEALED = "sealed"
    """It is sealed, and nobody gets an error."""

    WAITS = "sealed later"
    """It waits for whoever takes the dead one's place, and is sealed with him."""

    ABORTED = "aborted"
    """It is aborted, and whoever waits for it gets an error that names the dead one; version 1 stays the front."""

    GIVEN_BACK = "given back"
    """The daemon was told to end for good: the stage is gone, and whoever waits is told so."""


@dataclass(frozen=True)
class Asked:
    """In a client: a request of this kind; where the daemon's answer has to wait, ``taken`` names what shows in
    its status once the request is carried out."""

    kind: str
    version: int | None = None
    taken: str = ""


@dataclass(frozen=True)
class Copied:
    """In a trainer: the copy of a tensor; ``moments`` for the moment between its elements and their moments."""

    tensor: str
    moments: bool = False


@dataclass(frozen=True)
class Viewed:
    """In an engine worker: the reading of a tensor."""

    tensor: str


@dataclass(frozen=True)
class Reconnected:
    """In a client: its way to the daemon's successor."""


@dataclass(frozen=True)
class Handled:
    """In the daemon: the request of this kind with these fields, at the ``passage``-th time."""

    kind: str
    rank: int | None = None
    version: int | None = None
    newer_than: int | None = None
    passage: int = 1


@dataclass(frozen=True)
class Changed:
    """In the daemon: the double buffer's change of this name, to this version."""

    method: str
    version: int


@dataclass(frozen=True)
class Called:
    """In the daemon: a function's ``passage``-th call, on entering or on leaving it."""

    function: str
    passage: int = 1
    leaving: bool = False


@dataclass(frozen=True)
class Torn:
    """In the daemon: half the bytes of the first ledger record after a function's ``passage``-th return."""

    function: str
    passage: int = 1


@dataclass(frozen=True)
class Written:
    """In the daemon: the ledgers written, answers not sent, after a function's ``passage``-th return."""

    function: str
    passage: int = 1


Hook = Asked | Copied | Viewed | Reconnected | Handled | Changed | Called | Torn | Written


@dataclass(frozen=True)
class Point:
    """Where a process is killed.

    Attributes:
        what: tells points of the same step and moment apart.
        fate: what becomes of version 2.
        how: what the error that the survivors get says of the dead trainer rank.
        front: of which version the front is when the daemon is started again only after its clients gave up.
    """

    role: Role
    step: Step
    moment: Moment
    hook: Hook
    what: str = ""
    fate: Fate = Fate.SEALED
    how: str = "died"
    front: int = 1

    @property
    def id(self) -> str:
        """Its name in the list of tests."""
        return "-".join(f"{self.role} {self.step} {self.moment} {self.what}".split())

    @property
    def text(self) -> str:
        """The same for people."""
        return f"{self.moment} {self.step}" + (f": {self.what}" if self.what else "")


CREATE: Final = "stagingd.segment:create"
"""The second segment that a daemon makes is that of the stage ``second``."""


def _three(role: Role, step: Step, hook: Hook, *fates: Fate, what: str = "", front: int = 1) -> Iterator[Point]:
    for moment, fate in zip(Moment, fates or [Fate.SEALED] * 3, strict=True):
        yield Point(role, step, moment, hook, what, fate, front=front)


def _trainer() -> Iterator[Point]:
    role, aborted, sealed = Role.TRAINER, Fate.ABORTED, Fate.SEALED
    founding = Asked("declare", taken="declared")
    yield from _three(role, Step.DECLARE, founding, what="founding a stage")
    yield from _three(role, Step.DECLARE, Asked("declare"), Fate.WAITS, aborted, aborted, what="coming back")
    yield from _three(role, Step.BEGIN, Asked("begin", 2), aborted, aborted, aborted)
    for tensor in ("rows", "columns", "counts"):
        yield from _three(role, Step.COPY, Copied(tensor), aborted, aborted, aborted, what=tensor)
    yield Point(role, Step.COPY, Moment.DURING, Copied("rows", moments=True), "rows, moments missing", aborted)
    yield from _three(role, Step.COMMIT, Asked("commit", 2, taken="committed"), aborted, sealed, sealed)
    yield from _three(role, Step.SEAL, Asked("commit", 2), aborted, sealed, sealed)
    yield from _three(role, Step.FLIP, Asked("begin", 3), what="by begin")
    yield Point(role, Step.SHUTDOWN, Moment.BEFORE, Asked("bye"), fate=aborted)
    for moment in (Moment.DURING, Moment.AFTER):
        yield Point(role, Step.SHUTDOWN, moment, Asked("bye"), fate=aborted, how="closed its connection")
    away = "died while the daemon was away"
    yield Point(role, Step.RECOVERY, Moment.BEFORE, Reconnected(), fate=aborted, how=away)
    yield Point(role, Step.RECOVERY, Moment.DURING, Reconnected(), fate=aborted)
    yield Point(role, Step.RECOVERY, Moment.AFTER, Reconnected())


def _worker() -> Iterator[Point]:
    role = Role.WORKER
    yield from _three(role, Step.ATTACH, Asked("attach"))
    yield from _three(role, Step.FLIP, Asked("lease"), what="by lease")
    yield from _three(role, Step.LEASE, Asked("lease"))
    for tensor in ("rows", "columns", "counts"):
        yield from _three(role, Step.READ, Viewed(tensor), what=tensor)
    yield from _three(role, Step.RELEASE, Asked("release"))
    yield from _three(role, Step.SHUTDOWN, Asked("bye"))
    yield from _three(role, Step.RECOVERY, Reconnected())


def _daemon() -> Iterator[Point]:
    role = Role.DAEMON
    yield from _founding()
    yield from _three(role, Step.DECLARE, Handled("declare", rank=1, passage=2), what="coming back")
    yield from _three(role, Step.ATTACH, Handled("attach", rank=1, passage=2))
    yield from _three(role, Step.BEGIN, Handled("begin", rank=1, version=2))
    yield from _three(role, Step.COPY, Copied("rows"), what="by a trainer")
    yield from _three(role, Step.COMMIT, Handled("commit", rank=0, version=2))
    yield from _sealing()
    yield from _three(role, Step.FLIP, Handled("lease", rank=0, newer_than=1), what="by lease", front=2)
    yield from _three(role, Step.FLIP, Changed("_make_front", 3), what="by begin", front=3)
    yield from _three(role, Step.LEASE, Handled("lease", rank=1, version=1))
    yield from _three(role, Step.READ, Viewed("rows"), what="by a worker")
    yield from _three(role, Step.RELEASE, Handled("release", rank=1, passage=2))
    yield from _three(role, Step.SHUTDOWN, Handled("bye", passage=2), what="of a client")
    yield from _ending()
    yield from _recovering()


def _founding() -> Iterator[Point]:
    role, step, what = Role.DAEMON, Step.DECLARE, "founding a stage"
    yield Point(role, step, Moment.BEFORE, Handled("declare", rank=0, passage=2), what)
    making: dict[str, Hook] = {
        "memory allocated": Called("stagingd.segment:_allocate", 2, leaving=True),
        "memory without a name": Called("stagingd.segment:_give_name", 2),
        "memory with two names": Called("stagingd.segment:_unlink", 2),
        "memory without a state": Called(CREATE, 2, leaving=True),
        "first record half written": Torn(CREATE, 2),
    }
    for how, hook in making.items():
        yield Point(role, step, Moment.DURING, hook, f"{what}, {how}")
    yield Point(role, step, Moment.AFTER, Written(CREATE, 2), what)


def _sealing() -> Iterator[Point]:
    for moment, front in zip(Moment, (1, 1, 2), strict=True):
        yield Point(Role.DAEMON, Step.SEAL, moment, Changed("seal", 2), front=front)


def _ending() -> Iterator[Point]:
    role, step, gone = Role.DAEMON, Step.SHUTDOWN, Fate.GIVEN_BACK
    stop, over = "stop (SIGTERM)", "hand over (SIGUSR1)"
    yield Point(role, step, Moment.BEFORE, Called("stagingd.service:Service.stop"), stop)
    yield Point(role, step, Moment.DURING, Called("stagingd.service:Service._remove", 2), stop, gone)
    yield Point(role, step, Moment.AFTER, Called("stagingd.service:Service.stop", leaving=True), stop, gone)
    told = Called("zmq:Context.destroy", leaving=True)
    yield Point(role, step, Moment.AFTER, told, f"{stop}, clients told", gone)
    hand_over = "stagingd.service:Service.hand_over"
    yield Point(role, step, Moment.BEFORE, Called(hand_over), over)
    yield Point(role, step, Moment.DURING, Called("stagingd.segment:Segment.close", 2), over)
    yield Point(role, step, Moment.AFTER, Called(hand_over, leaving=True), over)


def _recovering() -> Iterator[Point]:
    role, step = Role.DAEMON, Step.RECOVERY
    adopt, bind = "stagingd.service:Service._adopt", "stagingd.daemon:Daemon._bind"
    yield Point(role, step, Moment.BEFORE, Called("stagingd.service:Service.recover"))
    yield Point(role, step, Moment.DURING, Called(adopt, 2), "one stage of two adopted")
    yield Point(role, step, Moment.DURING, Torn(adopt, 2), "half a ledger written again")
    yield Point(role, step, Moment.AFTER, Called(bind), "no socket bound")
    yield Point(role, step, Moment.AFTER, Called(bind, 2), "only events' socket bound")


POINTS: Final = (*_trainer(), *_worker(), *_daemon())
BY_ID: Final = {point.id: point for point in POINTS}

ABSENT: Final[dict[tuple[Role, Step], str]] = {
    (Role.TRAINER, Step.ATTACH): "only engines attach",
    (Role.TRAINER, Step.LEASE): "only engines lease",
    (Role.TRAINER, Step.READ): "only engines read",
    (Role.TRAINER, Step.RELEASE): "only engines release",
    (Role.WORKER, Step.DECLARE): "only trainers declare",
    (Role.WORKER, Step.BEGIN): "only trainers begin",
    (Role.WORKER, Step.COPY): "only trainers copy",
    (Role.WORKER, Step.COMMIT): "only trainers commit",
    (Role.WORKER, Step.SEAL): "the last trainer's commit seals",
}
"""Which roles take no part in which steps, and why."""


def holes() -> list[str]:
    """Combinations of role, step and moment that neither have a point nor are said to have no meaning."""
    there = {(point.role, point.step, point.moment) for point in POINTS}
    return [
        f"{role} {moment} {step}"
        for role, step, moment in product(Role, Step, Moment)
        if ((role, step) in ABSENT) == ((role, step, moment) in there)
    ]


def of(role: Role) -> list[Point]:
    """The points at which such a process is killed."""
    return [point for point in POINTS if point.role is role]
