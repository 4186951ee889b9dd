# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The examination: all checks in turn."""

from __future__ import annotations

from collections.abc import Callable

from stagingd.config import Settings
from stagingd.doctor.access import Access, judge_folder, judge_group, read_access
from stagingd.doctor.answer import Answer, State, ask, judge_answer
from stagingd.doctor.finding import Finding, Level, Remedy, Report, ok
from stagingd.doctor.gpu_process import GpuCheckFailed, torch_is_installed, try_gpus
from stagingd.doctor.gpus import judge_failure, judge_gpus, judge_untried
from stagingd.doctor.installed import judge_installed, read_installed
from stagingd.doctor.locking import judge_locking
from stagingd.doctor.numa import judge_numa, read_nodes
from stagingd.doctor.pages import judge_huge_pages, judge_swap, read_pages
from stagingd.doctor.pci import PciGpu, read_gpus
from stagingd.doctor.process import judge_descriptors, judge_namespace
from stagingd.doctor.room import judge_group_limit, judge_room, read_room
from stagingd.doctor.shared import judge_segments, judge_served, judge_shared, read_shared
from stagingd.doctor.subject import Subject, read_subject
from stagingd.doctor.wanted import Wanted, size_text
from stagingd.machine.cgroups import tightest_limit
from stagingd.machine.files import Files
from stagingd.machine.mounts import read_mounts

Say = Callable[[str], None]
"""Told what is being looked at."""


def examine(wanted: Wanted, settings: Settings, say: Say) -> Report:
    """Look at everything. Refusals become findings; nothing is changed on the machine.

    Args:
        wanted: the size that memory is held against.
        settings: the daemon's.
        say: told before each part what it looks at.
    """
    files = Files()
    say("asking the daemon")
    answer = ask(settings.control_socket)
    say("looking at memory and permissions")
    findings = examine_host(wanted, settings, answer, files)
    say("trying GPUs: each registers shared memory, and copies to it and from it")
    findings += _of_gpus(read_gpus(files), read_subject(files, None), wanted)
    return Report.of(wanted, tuple(findings))


def examine_host(wanted: Wanted, settings: Settings, answer: Answer, files: Files) -> list[Finding]:
    """All that is read of the machine without trying its GPUs.

    Args:
        wanted: the size that memory is held against.
        settings: the daemon's.
        answer: what came of asking it.
        files: where the machine is read.
    """
    access, subject = read_access(settings), read_subject(files, answer.pid)
    return [
        _judge_size(wanted),
        judge_answer(answer, settings.group or access.group),
        *_of_memory(files, subject, settings, wanted),
        *_of_access(files, access, answer, settings),
        *(_out_of_sight() if answer.out_of_sight else _of_process(files, subject, settings, wanted)),
        *judge_installed(read_installed(files)),
    ]


def _judge_size(wanted: Wanted) -> Finding:
    if wanted.given:
        return ok("size", str(wanted))
    return Finding(
        check="size",
        level=Level.NOTE,
        found=f"none was given; room is held against versions of {size_text(wanted.version_bytes)}",
        costs="a machine that has room for these may have none for yours",
        remedies=(
            Remedy(
                where="with the size of one version: 1.9 GiB per billion parameters in bf16",
                do="stagingd doctor --size-gib N",
            ),
        ),
    )


def _of_memory(files: Files, subject: Subject, settings: Settings, wanted: Wanted) -> list[Finding]:
    mounts = read_mounts(files)
    pages = read_pages(files, mounts)
    return [
        *judge_room(read_room(files), subject, wanted),
        judge_huge_pages(pages, wanted),
        judge_swap(pages, lock_memory=settings.lock_memory),
    ]


def _of_process(files: Files, subject: Subject, settings: Settings, wanted: Wanted) -> list[Finding]:
    return [
        judge_locking(subject, wanted, lock_memory=settings.lock_memory),
        judge_group_limit(tightest_limit(files, read_mounts(files), subject.groups), subject, wanted),
        judge_namespace(subject, settings.heartbeat_s),
        judge_descriptors(subject),
        *judge_numa(read_nodes(files), read_gpus(files), subject),
    ]


def _out_of_sight() -> list[Finding]:
    found = Finding(
        check="limits",
        level=Level.NOTE,
        found="those of the daemon that serves cannot be read from this pid namespace",
        costs="its limits on locked memory, memory and descriptors, and its NUMA nodes, were not held against anything",
        remedies=(Remedy(where="beside the daemon, in its container or on the host", do="stagingd doctor"),),
    )
    return [found]


def _of_access(files: Files, access: Access, answer: Answer, settings: Settings) -> list[Finding]:
    served = answer.state is State.SERVES
    shared = read_shared(files, read_mounts(files), settings)
    group = (settings.group, settings.group_id) if settings.group else None
    return [
        judge_folder(access, served=served),
        judge_group(access, group, served=served),
        judge_shared(shared),
        judge_served(shared, answer) if served else judge_segments(shared, settings, access.uid),
    ]


def _of_gpus(gpus: list[PciGpu], own: Subject, wanted: Wanted) -> list[Finding]:
    if not torch_is_installed():
        return judge_untried(gpus)
    try:
        return judge_gpus(try_gpus(), gpus, own, wanted)
    except GpuCheckFailed as failure:
        return judge_failure(failure, gpus)
