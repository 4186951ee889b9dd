# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The process itself: its pid namespace, and how many files it may open."""

from __future__ import annotations

from typing import Final

from stagingd.doctor.answer import own_pids
from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.subject import INITIAL_PIDS, Place, Subject

NAMESPACE, DESCRIPTORS = "pid namespace", "descriptors"

FEW_DESCRIPTORS: Final = 4096
"""A quarter is used before the daemon takes no more connections; each client takes two: so many serve 500 clients."""


def judge_namespace(subject: Subject, heartbeat_s: float | None) -> Finding:
    """Whether the daemon sees the processes of clients outside its container.

    Args:
        subject: the daemon.
        heartbeat_s: what the settings say of clients that it does not see.
    """
    found = subject.pid_namespace
    if found == INITIAL_PIDS:
        return ok(NAMESPACE, f"{subject.who} is in the host's, and sees the processes of all clients")
    if heartbeat_s is not None:
        return ok(NAMESPACE, f"clients that the daemon does not see are known by heartbeats, of {heartbeat_s:g} s")
    where = f"{found}, not the host's" if found else "not told"
    return Finding(
        check=NAMESPACE,
        level=Level.WARNING if found else Level.NOTE,
        found=f"that of {subject.who} is {where}",
        costs="clients outside of this container are refused, since the daemon would not learn of their end; nothing, "
        "where trainers and engines run in this container too",
        remedies=own_pids(),
    )


def judge_descriptors(subject: Subject) -> Finding:
    """Whether there are descriptors for all clients."""
    limit = subject.descriptors
    if limit is None:
        return ok(DESCRIPTORS, f"{subject.who} may open any number")
    found = f"{subject.who} may open {limit} files, which serves about {limit // 8} clients"
    if limit >= FEW_DESCRIPTORS:
        return ok(DESCRIPTORS, found)
    return Finding(
        check=DESCRIPTORS,
        level=Level.WARNING,
        found=found,
        costs="further trainers and engines are kept waiting until others have gone",
        remedies=_more_descriptors(subject),
    )


def _more_descriptors(subject: Subject) -> tuple[Remedy, ...]:
    if subject.place is Place.UNIT:
        return (
            Remedy(where=f"systemctl edit {subject.unit}", do="[Service]\nLimitNOFILE=65536"),
            Remedy(where="and then", do=f"systemctl restart {subject.unit}"),
        )
    if subject.place is Place.CONTAINER:
        return (Remedy(where="docker run, podman run", do="--ulimit nofile=65536:65536"),)
    if subject.place is Place.POD:
        return (Remedy(where="in a drop-in of containerd.service at the node", do="[Service]\nLimitNOFILE=65536"),)
    line = f"{subject.user} - nofile 65536"
    return (
        Remedy(where="as root, then log in anew", do=f"echo '{line}' >> /etc/security/limits.d/stagingd.conf"),
        Remedy(where="for this shell alone", do="sudo prlimit --nofile=65536:65536 --pid $$"),
    )
