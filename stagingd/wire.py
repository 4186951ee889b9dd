# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Every message of the control channel, typed; msgpack in and out; limits.

A request is ``[request id, body]`` on a DEALER socket, its answer ``[request id, body]`` with the same
id. A client has one request under way at a time. Where its answer was lost with the connection or the daemon,
the client asks once more and sets ``again``: then what was done before is not done twice, nor refused for it.
Bodies are msgpack maps whose ``kind`` names the message. Nothing is ever unpickled or executed:
a body that is not exactly one of these messages is refused with a typed error.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal, TypeVar

import msgpack
from pydantic import FailFast, Field, TypeAdapter, ValidationError

from stagingd.aliases import Alias
from stagingd.boxes import Box
from stagingd.catalog import GridName, TensorDeclaration
from stagingd.errors import Context, MessageRefused, MessageTooLarge, StagingError, from_code
from stagingd.formats import Quantization
from stagingd.health import LayerError
from stagingd.history import VERSIONS, VersionHistory
from stagingd.layers import MOST_LAYERS
from stagingd.moments import ALL_GRIDS
from stagingd.policy import Policy
from stagingd.record import Elapsed, Name, Rank, RankCount, Record, Seconds, StageName, Version

PROTOCOL: Final = 6
"""Raised whenever a message changes: daemon and clients must agree."""

MAX_MESSAGE_BYTES: Final = 64 * 2**20
"""A declaration of 18,000 tensors by 64 ranks stays below 32 MiB."""

MAX_ARRAY_ITEMS: Final = 16 * 2**20
"""Items in one array of a message; msgpack's own limit on nesting bounds the depth."""

MAX_MAP_ITEMS: Final = 64
"""Entries in one map of a message: no message has so many fields."""

MAX_TEXT: Final = 2000
"""Characters of a text in a refusal: it may quote what was sent, and that may be as long as a message."""


TOKEN_BYTES: Final = 16
"""Length of a connection's token."""


class OnNonFinite(StrEnum):
    """What sealing does with a version that holds NaN or infinite values."""

    REJECT = "reject"
    """Refuse it: poisoned weights never reach an engine."""

    WARN = "warn"
    """Seal it and log which tensors hold how many."""


class StageOptions(Record):
    """How a stage behaves; every rank declares the same."""

    policy: Annotated[Policy, Field(strict=False)] = Policy.LATEST
    grids: Annotated[tuple[GridName, ...], Field(min_length=1, max_length=len(ALL_GRIDS)), FailFast()] = ALL_GRIDS
    on_non_finite: Annotated[OnNonFinite, Field(strict=False)] = OnNonFinite.REJECT
    quantization: Quantization | None = None


class Hello(Record):
    """The first request of a connection: who speaks. Answered by Welcome.

    ``connection`` is a random token of the client's. With it the client says hello again when the connection
    broke or the daemon was restarted, and holds what it held.
    """

    kind: Literal["hello"] = "hello"
    protocol: int
    connection: Annotated[bytes, Field(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    name: Annotated[str, Field(min_length=1, max_length=128)]


class Declare(Record):
    """A trainer rank's tensors, and further names of them. Answered by Declared once all ranks have declared."""

    kind: Literal["declare"] = "declare"
    stage: StageName
    rank: Rank
    ranks: RankCount
    options: StageOptions
    tensors: Annotated[tuple[TensorDeclaration, ...], FailFast()]
    aliases: Annotated[tuple[Alias, ...], FailFast()] = ()
    timeout_s: Seconds


class Begin(Record):
    """A trainer rank begins a version. Answered by Begun once there is a slot to fill."""

    kind: Literal["begin"] = "begin"
    stage: StageName
    rank: Rank
    version: Version
    timeout_s: Seconds
    again: bool = False


class Measure(Record):
    """A trainer rank has stored the moments of what it owns and quantizes. Answered by Measured once all ranks have.

    Where trainers quantize, scales follow from the moments of all of them.
    """

    kind: Literal["measure"] = "measure"
    stage: StageName
    rank: Rank
    version: Version
    timeout_s: Seconds
    again: bool = False


class Commit(Record):
    """A trainer rank has put ``boxes`` boxes, all that it owns. Answered by Sealed."""

    kind: Literal["commit"] = "commit"
    stage: StageName
    rank: Rank
    version: Version
    boxes: Annotated[int, Field(ge=0)]
    timeout_s: Seconds
    again: bool = False


class Abort(Record):
    """A trainer rank gives up the version that is being filled. Answered by Done."""

    kind: Literal["abort"] = "abort"
    stage: StageName
    rank: Rank
    version: Version
    reason: Annotated[str, Field(max_length=2000)]


class Attach(Record):
    """A reader rank of an engine. Answered by Attached once the stage exists."""

    kind: Literal["attach"] = "attach"
    stage: StageName
    engine: Name
    rank: Rank
    ranks: RankCount
    timeout_s: Seconds


class LeaseVersion(Record):
    """A reader rank asks to read a version, by default the newest. Answered by Leased.

    With ``early`` one that is still being filled will do, where there is no other.
    """

    kind: Literal["lease"] = "lease"
    stage: StageName
    engine: Name
    rank: Rank
    version: Version | None = None
    newer_than: Version | None = None
    early: bool = False
    timeout_s: Seconds
    again: bool = False


class Release(Record):
    """A reader rank has read what it needs. Answered by Done; of a version that it read early, once that is sealed."""

    kind: Literal["release"] = "release"
    stage: StageName
    lease: Annotated[int, Field(ge=0)]
    rank: Rank
    timeout_s: Seconds = 60.0
    again: bool = False


class Status(Record):
    """Asks what every stage holds. Answered by StatusReport."""

    kind: Literal["status"] = "status"


class History(Record):
    """Asks what has happened to the last versions of a stage, and when. Answered by HistoryReport."""

    kind: Literal["history"] = "history"
    stage: StageName
    last: Annotated[int, Field(ge=1, le=VERSIONS)] = VERSIONS


class Report(Record):
    """A worker of an engine tells that it has made a version live, or has examined one. Answered by Done.

    It may come by another connection of the same process than the one by which the worker reads.

    Attributes:
        seconds: for how long that kept the engine from generating.
        bytes: how many were written to the live weights.
        ago_s: how long ago it was done, when this is sent, in seconds.
        errors: what quantization costs in the worker's slice, where it was examined.
    """

    kind: Literal["report"] = "report"
    stage: StageName
    engine: Name
    rank: Rank
    version: Version
    what: Literal["swapped", "updated", "examined"]
    seconds: Elapsed
    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    ago_s: Elapsed = 0.0
    errors: Annotated[tuple[LayerError, ...], Field(max_length=MOST_LAYERS), FailFast()] = ()


class Drop(Record):
    """Give a stage's memory back. Refused while trainers or engines are attached. Answered by Done."""

    kind: Literal["drop"] = "drop"
    stage: StageName
    again: bool = False


class Bye(Record):
    """The connection is closed in good order: what it held is given back. Answered by Done."""

    kind: Literal["bye"] = "bye"


Request = (
    Hello
    | Declare
    | Begin
    | Measure
    | Commit
    | Abort
    | Attach
    | LeaseVersion
    | Release
    | Status
    | History
    | Report
    | Drop
    | Bye
)


class Welcome(Record):
    """The daemon's side of Hello. Should it die, clients wait ``return_s`` seconds for a successor."""

    kind: Literal["welcome"] = "welcome"
    protocol: int
    pid: int
    events: Name
    return_s: float


class Declared(Record):
    """The stage exists: its segment, which begins with the catalog, and the newest sealed version."""

    kind: Literal["declared"] = "declared"
    segment: Name
    newest: Version | None


class Begun(Record):
    """The slot to fill, the attempt's number in its progress, and whether the rank was kept waiting for it."""

    kind: Literal["begun"] = "begun"
    slot: int
    attempt: int
    waited: bool


class Measured(Record):
    """All moments of the version are in its slot."""

    kind: Literal["measured"] = "measured"
    version: Version


class Sealed(Record):
    """The version is complete and readable."""

    kind: Literal["sealed"] = "sealed"
    version: Version


class Attached(Record):
    """The stage's segment, which begins with the catalog, and the newest sealed version, for a reader."""

    kind: Literal["attached"] = "attached"
    segment: Name
    newest: Version | None


class Leased(Record):
    """The slot to read, and for how long it is certain not to be written.

    A version that is leased early is still being filled, by an ``attempt`` of which the slot tells how far it has come
    (``stagingd.progress``); and what is read counts only once the lease has been released.
    """

    kind: Literal["leased"] = "leased"
    lease: int
    version: Version
    slot: int
    deadline_s: float
    attempt: int | None = None


class Done(Record):
    """There is nothing to say."""

    kind: Literal["done"] = "done"


class LeaseStatus(Record):
    """A lease, for people: who reads which version, since when. ``reading_ranks`` may be reading now."""

    lease: int
    engine: str
    version: int
    awaited_ranks: tuple[int, ...]
    reading_ranks: tuple[int, ...]
    age_s: float


class SlotStatus(Record):
    """A slot, for people: which trainer ranks have begun, measured and committed what it holds."""

    state: str
    version: int | None
    begun_ranks: tuple[int, ...]
    measured_ranks: tuple[int, ...]
    committed_ranks: tuple[int, ...]


class WaitingStatus(Record):
    """A request that waits, for people: whose, for what, from whom, and for how long already."""

    who: str
    what: str
    peers: tuple[str, ...]
    waited_s: float

    def __str__(self) -> str:
        return f"{self.who} waits for {self.what} from {', '.join(self.peers)} since {self.waited_s:.1f} s"


class StageStatus(Record):
    """A stage, for people."""

    stage: str
    policy: str
    trainers: tuple[int, ...]
    ranks: int
    engines: tuple[str, ...]
    tensors: int
    segment: str
    segment_bytes: int
    slots: tuple[SlotStatus, ...]
    leases: tuple[LeaseStatus, ...]
    waiting: tuple[WaitingStatus, ...]
    sealed_versions: int
    aborted_versions: int
    begins_kept_waiting: int


class StatusReport(Record):
    """What the daemon holds."""

    kind: Literal["status_report"] = "status_report"
    pid: int
    uptime_s: float
    connections: int
    refused_messages: int
    stages: tuple[StageStatus, ...]


class HistoryReport(Record):
    """A stage's last versions, oldest first.

    Their times are on the machine's monotonic clock; ``wall_minus_monotonic_s`` more is seconds since 1970.
    """

    kind: Literal["history_report"] = "history_report"
    versions: tuple[VersionHistory, ...]
    wall_minus_monotonic_s: float


class Refusal(Record):
    """A request's typed error; nothing was changed."""

    kind: Literal["refusal"] = "refusal"
    code: str
    what: str
    remedy: str
    context: dict[str, Any]


Answer = (
    Welcome | Declared | Begun | Measured | Sealed | Attached | Leased | Done | StatusReport | HistoryReport | Refusal
)


class Event(Record):
    """What happened to a stage, on the PUB socket: ``sealed``, ``aborted``, ``leased``, ``released``, …"""

    kind: Literal["event"] = "event"
    event: Name
    stage: StageName
    version: Version | None
    detail: str


Message = TypeVar("Message")

_REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_ANSWERS: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])
_EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def encode(message: Record) -> bytes:
    """The message as msgpack.

    Raises:
        MessageTooLarge: it exceeds the control channel's limit; the peer would refuse it.
    """
    body: bytes = msgpack.packb(message.model_dump())
    _check_size(len(body))
    return body


def decode_request(body: bytes) -> Request:
    """What a client asks. Raises MessageRefused, MessageTooLarge."""
    return _decode(_REQUESTS, body)


def decode_answer(body: bytes) -> Answer:
    """What the daemon answers. Raises MessageRefused, MessageTooLarge."""
    return _decode(_ANSWERS, body)


def decode_event(body: bytes) -> Event:
    """What the daemon tells everybody. Raises MessageRefused, MessageTooLarge."""
    return _decode(_EVENTS, body)


def _check_size(size: int) -> None:
    if size > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(
            f"a message of {size} bytes exceeds the limit of {MAX_MESSAGE_BYTES}",
            remedy="tensors go through shared memory; split a declaration into several stages",
        )


def _decode(adapter: TypeAdapter[Message], body: bytes) -> Message:
    _check_size(len(body))
    try:
        plain = _unpacked(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageRefused(
            f"a message of {len(body)} bytes is not msgpack: {error}", remedy="use a client of the same version"
        ) from error
    try:
        return adapter.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:MAX_TEXT] or "the message"
        raise MessageRefused(
            f"a message is malformed: {where}: {first['msg'][:MAX_TEXT]}", remedy="use a client of the same version"
        ) from error


def _unpacked(body: bytes) -> object:
    """What msgpack makes of a body. Raises ValueError, msgpack.UnpackException."""
    # First without making anything: arrays are allocated as long as they say that they are, level by level.
    walker = msgpack.Unpacker(max_buffer_size=MAX_MESSAGE_BYTES)
    walker.feed(body)
    walker.skip()
    plain = msgpack.unpackb(body, use_list=False, max_array_len=MAX_ARRAY_ITEMS, max_map_len=MAX_MAP_ITEMS)
    # The kind decides what is validated; pydantic would put any other thing into words, however deep.
    if not isinstance(plain, dict) or not isinstance(plain.get("kind"), str):
        raise ValueError("it is not a map with a kind")
    return plain


def refusal(error: StagingError) -> Refusal:
    """The error as an answer."""
    context = {name: _bounded(value) for name, value in error.context.items()}
    return Refusal(code=error.code, what=error.what[:MAX_TEXT], remedy=error.remedy[:MAX_TEXT], context=context)


def _bounded(value: Context) -> object:
    if isinstance(value, Box):
        return list(value)
    return value[:MAX_TEXT] if isinstance(value, str) else value


def refused(answer: Refusal) -> StagingError:
    """The error that an answer stands for, to be raised by the one who asked."""
    context = {name: value for name, value in answer.context.items() if name not in ("code", "what", "remedy")}
    match context.get("box"):
        case (tuple() as offsets, tuple() as lengths):
            context["box"] = Box(offsets, lengths)
    return from_code(answer.code, answer.what, answer.remedy, context)
