# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Everything that stagingd refuses, as types.

An error says what happened, to which tensor, version, box or peer, and what to do about it. It has
a code, by which it crosses the control channel: the daemon's refusal is raised in the client as
the same type.
"""

from __future__ import annotations

from typing import Any, ClassVar

from stagingd.boxes import Box

Context = str | int | float | Box | list[str] | None


class StagingError(Exception):
    """Base of all of them.

    Args:
        what: what happened, naming the tensor, version, box or peer.
        remedy: what the reader of the message can do about it.
        context: the same names as fields, for programs: ``stage``, ``tensor``, ``box``, ``version``,
            ``rank``, ``peer`` and the like.
    """

    code: ClassVar[str] = "staging_error"

    def __init__(self, what: str, *, remedy: str, **context: Context) -> None:
        super().__init__(f"{what}. {remedy[:1].upper()}{remedy[1:]}.")
        self.what = what
        self.remedy = remedy
        self.context = context


class UnknownStage(StagingError):
    """No stage of this name exists."""

    code = "unknown_stage"


class UnknownTensor(StagingError):
    """The catalog has no tensor of this name."""

    code = "unknown_tensor"


class UnknownModel(StagingError):
    """Nobody has said how the tensors of a model of this kind are named and ordered."""

    code = "unknown_model"


class WrongDtype(StagingError):
    """A shard's dtype is not the declared one, or is none that can be staged."""

    code = "wrong_dtype"


class WrongShape(StagingError):
    """A shard's or box's shape or rank is not the declared one."""

    code = "wrong_shape"


class DeviceUnusable(StagingError):
    """Shards cannot be flushed from a device."""

    code = "device_unusable"


class BoxOutside(StagingError):
    """A box does not lie inside its tensor."""

    code = "box_outside"


class BoxDoubled(StagingError):
    """Two boxes of a tensor share elements without being replicas of each other."""

    code = "box_doubled"


class BoxMissing(StagingError):
    """No rank declared these elements."""

    code = "box_missing"


class CatalogMismatch(StagingError):
    """A declaration is not the one that the stage was made from."""

    code = "catalog_mismatch"


class OutOfOrder(StagingError):
    """A call came before the one that it needs, or after the one that ends it."""

    code = "out_of_order"


class CommitIncomplete(StagingError):
    """A rank committed without having put all its boxes."""

    code = "commit_incomplete"


class VersionNotRising(StagingError):
    """A version is not greater than the newest that the stage has seen."""

    code = "version_not_rising"


class VersionMismatch(StagingError):
    """Two ranks of one group are at different versions."""

    code = "version_mismatch"


class VersionAborted(StagingError):
    """The version was given up before it was sealed."""

    code = "version_aborted"


class VersionNotAvailable(StagingError):
    """The stage does not hold the version that was asked for."""

    code = "version_not_available"


class NonFiniteValues(StagingError):
    """A version holds NaN or infinite values and the stage's policy refuses them."""

    code = "non_finite_values"


class RankTaken(StagingError):
    """Another live process already speaks for this rank."""

    code = "rank_taken"


class PeerDied(StagingError):
    """A process that this one depended on is gone."""

    code = "peer_died"


class PeerNotVisible(StagingError):
    """The daemon cannot see the process that speaks, so it could not learn of its end."""

    code = "peer_not_visible"


class PeerNotAdmitted(StagingError):
    """The process that speaks runs as a user who may not use this daemon."""

    code = "peer_not_admitted"


class TooManyPeers(StagingError):
    """The daemon has as many connections, questions or readers as it admits."""

    code = "too_many_peers"


class LeaseLost(StagingError):
    """The lease ended before it was released."""

    code = "lease_lost"


class DeadlineExceeded(StagingError):
    """Something awaited did not come in time."""

    code = "deadline_exceeded"


class NotEnoughMemory(StagingError):
    """The machine has no room for two copies of the model, or may not lock them."""

    code = "not_enough_memory"


class SegmentTaken(StagingError):
    """A shared memory segment of this name belongs to somebody else."""

    code = "segment_taken"


class SegmentForeign(StagingError):
    """A shared memory segment belongs to another user, or was not made by stagingd."""

    code = "segment_foreign"


class SegmentUnreadable(StagingError):
    """A shared memory segment is not there, damaged, or of a format that this version of stagingd cannot read."""

    code = "segment_unreadable"


class SegmentUnusable(StagingError):
    """The system refuses to make a shared memory segment."""

    code = "segment_unusable"


class DaemonUnreachable(StagingError):
    """No daemon answers on the socket."""

    code = "daemon_unreachable"


class ConnectionLost(DaemonUnreachable):
    """The daemon ended, or cut this connection off."""

    code = "connection_lost"


class DaemonRunning(StagingError):
    """Another daemon serves this runtime directory."""

    code = "daemon_running"


class SocketNotTrusted(StagingError):
    """The socket belongs to another user."""

    code = "socket_not_trusted"


class MessageRefused(StagingError):
    """A message is malformed, truncated or of an unknown kind."""

    code = "message_refused"


class MessageTooLarge(StagingError):
    """A message exceeds the limit of the control channel."""

    code = "message_too_large"


class Disconnected(StagingError):
    """The daemon does not know this connection."""

    code = "disconnected"


class InternalError(StagingError):
    """The daemon, or a worker that prefetches, failed in a way that it did not foresee."""

    code = "internal_error"


def _all_types(base: type[StagingError]) -> dict[str, type[StagingError]]:
    found = {base.code: base}
    for sub in base.__subclasses__():
        found |= _all_types(sub)
    return found


def from_code(code: str, what: str, remedy: str, context: dict[str, Any]) -> StagingError:
    """The error that a peer's refusal describes; StagingError itself for a code not known here."""
    return _all_types(StagingError).get(code, StagingError)(what, remedy=remedy, **context)
