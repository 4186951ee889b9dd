# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""May two versions be locked into memory?"""

from __future__ import annotations

from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.subject import Place, Subject
from stagingd.doctor.wanted import Wanted, size_text

CHECK = "locking limit"


def judge_locking(subject: Subject, wanted: Wanted, *, lock_memory: bool) -> Finding:
    """The limit on locked memory against two versions.

    Args:
        subject: whose limit.
        wanted: the two versions.
        lock_memory: whether the daemon's settings ask for locking.
    """
    if not lock_memory:
        return ok(CHECK, "memory is not to be locked (STAGINGD_LOCK_MEMORY=false), so the limit does not count")
    if subject.locks_anything:
        return ok(CHECK, f"{subject.who} has CAP_IPC_LOCK and may lock any amount")
    if subject.lock_soft is None:
        return ok(CHECK, f"{subject.who} may lock any amount")
    left = max(0, subject.lock_soft - subject.locked)
    already = f" more, having locked {size_text(subject.locked)}" if subject.locked else ""
    found = f"{subject.who} may lock {size_text(left)}{already}; {wanted}"
    if left >= wanted.stage_bytes:
        return ok(CHECK, found)
    return Finding(
        check=CHECK,
        level=Level.ERROR,
        found=found,
        costs="the daemon refuses the stage when trainers declare it",
        remedies=(
            *raised_limit(subject, wanted.stage_bytes),
            *((_SERVICE,) if subject.place is Place.SHELL else ()),
            Remedy(where="without locking, on a machine that has no swap", do="STAGINGD_LOCK_MEMORY=false"),
        ),
    )


_SERVICE = Remedy(where="as a service, whose unit sets LimitMEMLOCK=infinity", do="systemctl enable --now stagingd")


def raised_limit(subject: Subject, needed: int) -> tuple[Remedy, ...]:
    """How the limit on locked memory is raised where a process was started.

    Args:
        subject: the process.
        needed: how many bytes it has to lock.
    """
    if subject.place is Place.POD:
        add = 'securityContext: {capabilities: {add: ["IPC_LOCK"]}}'
        return (Remedy(where="in the pod's specification, at the container (which runs as root)", do=add),)
    if subject.place is Place.CONTAINER:
        return (
            Remedy(where="docker run, podman run", do="--ulimit memlock=-1:-1"),
            Remedy(where="compose.yaml, at the service", do="ulimits: {memlock: -1}"),
        )
    if subject.place is Place.UNIT:
        unit = subject.unit or "stagingd.service"
        return (
            Remedy(where=f"systemctl edit {unit}", do="[Service]\nLimitMEMLOCK=infinity"),
            Remedy(where="and then", do=f"systemctl restart {unit}"),
        )
    within_hard = subject.lock_hard is None or subject.lock_hard >= needed + subject.locked
    if within_hard:
        limit = "unlimited" if subject.lock_hard is None else str(subject.lock_hard // 1024)
        return (Remedy(where="in this shell, before stagingd serve", do=f"ulimit -S -l {limit}"),)
    line = f"{subject.user} - memlock unlimited"
    return (
        Remedy(where="as root, then log in anew", do=f"echo '{line}' >> /etc/security/limits.d/stagingd.conf"),
        Remedy(where="for this shell alone", do="sudo prlimit --memlock=unlimited:unlimited --pid $$"),
    )
