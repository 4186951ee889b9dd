# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the pages of shared memory are: huge or small, and whether they may be swapped out.

A tmpfs such as /dev/shm goes by its own mount option ``huge=``; ``shmem_enabled`` is for other shared memory, and has a
say here only by its values ``deny`` and ``force`` (the kernel's admin-guide/mm/transhuge.rst).
"""

from __future__ import annotations

import re
from typing import Final

from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.room import read_meminfo
from stagingd.doctor.wanted import Wanted, size_text
from stagingd.machine.files import Files
from stagingd.machine.mounts import Mount, mounted_at
from stagingd.record import Record

HUGE, SWAP = "huge pages", "swap"

SMALL_S_PER_GIB: Final = 0.16
HUGE_S_PER_GIB: Final = 0.02
"""First touch of a GiB by one thread, measured on a host with H200 GPUs."""

_ENABLED: Final = "sys/kernel/mm/transparent_hugepage/shmem_enabled"


class Pages(Record):
    """How shared memory is paged.

    Attributes:
        mount_option: what /dev/shm was mounted with as ``huge=``; ``never`` where nothing was said.
        enabled: what is chosen in ``shmem_enabled``; None where the kernel has no huge pages for shared memory.
        swap: bytes of swap space.
    """

    mount_option: str
    enabled: str | None
    swap: int


def read_pages(files: Files, mounts: list[Mount]) -> Pages:
    """Read it."""
    chosen = re.search(r"\[(\w+)\]", files.text(_ENABLED) or "")
    shared = mounted_at(mounts, "/dev/shm")
    return Pages(
        mount_option=(shared.option("huge") if shared else None) or "never",
        enabled=chosen[1] if chosen else None,
        swap=read_meminfo(files).get("SwapTotal", 0),
    )


def judge_huge_pages(pages: Pages, wanted: Wanted) -> Finding:
    """Whether segments get huge pages, and how much longer it takes to make them where they do not."""
    setting = f"/dev/shm is mounted with huge={pages.mount_option}"
    if pages.enabled is None:
        found = "the kernel has no huge pages for shared memory"
        return _small(found, wanted, Remedy(where="in the kernel's configuration", do="CONFIG_TRANSPARENT_HUGEPAGE=y"))
    if pages.enabled == "deny":
        found = f"{setting}, but shmem_enabled is deny, which overrules it"
        return _small(found, wanted, Remedy(where="as root", do=f"echo never > /{_ENABLED}"), *_remount())
    if pages.enabled == "force" or pages.mount_option in ("always", "within_size"):
        why = "shmem_enabled is force" if pages.enabled == "force" else setting
        return ok(HUGE, f"{why}: segments are made of huge pages")
    return _small(f"{setting}: segments are made of small pages", wanted, *_remount())


def _small(found: str, wanted: Wanted, *remedies: Remedy) -> Finding:
    gibs = wanted.stage_bytes / 2**30
    slow, quick = gibs * SMALL_S_PER_GIB, gibs * HUGE_S_PER_GIB
    costs = (
        f"a stage of {size_text(wanted.stage_bytes)} takes about {slow:.2f} s to make instead of {quick:.2f} s, once "
        f"({SMALL_S_PER_GIB} against {HUGE_S_PER_GIB} s a GiB)"
    )
    return Finding(check=HUGE, level=Level.NOTE, found=found, costs=costs, remedies=remedies)


def _remount() -> tuple[Remedy, ...]:
    return (
        Remedy(
            where="as root (of the host, for a container), until the next boot",
            do="mount -o remount,huge=always /dev/shm",
        ),
        Remedy(where="for ever, a line of /etc/fstab", do="tmpfs /dev/shm tmpfs nosuid,nodev,huge=always 0 0"),
    )


def judge_swap(pages: Pages, *, lock_memory: bool) -> Finding:
    """Whether weights may be swapped out."""
    if pages.swap == 0:
        return ok(SWAP, "the machine has none")
    if lock_memory:
        return ok(SWAP, f"{size_text(pages.swap)}; stages are locked into memory, and are not swapped out")
    return Finding(
        check=SWAP,
        level=Level.WARNING,
        found=f"{size_text(pages.swap)}, and stages are not locked into memory (STAGINGD_LOCK_MEMORY=false)",
        costs="the kernel may swap weights out, and flushes and reads then wait for a disk",
        remedies=(
            Remedy(where="in the daemon's settings", do="STAGINGD_LOCK_MEMORY=true"),
            Remedy(where="or, as root", do="swapoff --all"),
        ),
    )
