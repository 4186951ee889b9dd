# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One GPU: does it take shared memory, does it copy right, and as fast as its link should let it?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Final

from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.gpu_report import Copies, GpuTrial, Registration
from stagingd.doctor.locking import raised_limit
from stagingd.doctor.pci import USABLE_SHARE, Link, PciGpu
from stagingd.doctor.subject import Subject
from stagingd.doctor.wanted import Wanted, size_text

FAST_SHARE: Final = 0.9
"""Of what a link should carry: copies below it are slow."""

IMPLAUSIBLE_SHARE: Final = 1.15
"""Copies faster than this show that what the machine says of the link is not so, as in some virtual machines."""

_DRIVER_ERRORS: Final = Remedy(
    where="to see errors of the driver and the bus", do="dmesg | grep -i -e nvrm -e xid -e aer"
)


def judge_trial(trial: GpuTrial, pci: PciGpu | None, subject: Subject, wanted: Wanted) -> list[Finding]:
    """What came of trying one GPU.

    Args:
        trial: that.
        pci: what the PCI bus says of it; None where it does not show it.
        subject: a process as those that use it, whose limits count.
        wanted: the size by which costs are reckoned.
    """
    findings = list(_judge_end(trial))
    findings += _judge_registrations(trial, subject, wanted)
    if pci is not None:
        findings.append(_judge_link(f"GPU {trial.index}", pci, trial.link_at_work))
    if trial.copies is not None:
        findings.append(_judge_copies(trial.index, trial.copies, pci, wanted))
    return findings


def judge_idle_link(pci: PciGpu) -> Finding:
    """The link of a GPU that was not tried: an idle one lowers its speed, but never gives up lanes."""
    return _judge_link(f"GPU {pci.address}", pci, None)


def _judge_end(trial: GpuTrial) -> Iterator[Finding]:
    if trial.problem and trial.short_of_memory:
        yield Finding(
            check=f"trial: GPU {trial.index}",
            level=Level.WARNING,
            found=f"that of {trial.name} at {trial.address} was not finished: {trial.problem}",
            costs="whether it copies right and fast is not known",
            remedies=(
                Remedy(where="to see who has its memory", do="nvidia-smi"),
                Remedy(where="and once they have ended", do="stagingd doctor"),
            ),
        )
    elif trial.problem:
        yield Finding(
            check=f"trial: GPU {trial.index}",
            level=Level.ERROR,
            found=f"that of {trial.name} at {trial.address} was not finished: {trial.problem}",
            costs="trainers and engines on it are likely to fail as it did",
            remedies=(_DRIVER_ERRORS, Remedy(where="to see its state", do=f"nvidia-smi -i {trial.address} -q")),
        )


def _judge_registrations(trial: GpuTrial, subject: Subject, wanted: Wanted) -> Iterator[Finding]:
    check = f"registration: GPU {trial.index}"
    tried = [one for one in (trial.written, trial.read) if one is not None]
    refused = next((one for one in tried if one.problem), None)
    if refused is None and tried:
        yield ok(check, _registered(tried, wanted))
    if refused is None:
        return
    engines = trial.read is not None and trial.read.problem is not None
    yield Finding(
        check=check,
        level=Level.ERROR if engines else Level.WARNING,
        found=refused.problem or "",
        costs="engines on it are refused when they attach"
        if engines
        else "trainers flush without it, at a fraction of the link's speed, and fence waits for the copies",
        remedies=(
            *raised_limit(subject, wanted.stage_bytes),
            Remedy(
                where="where it says NotSupported, to see which driver is to be replaced by a newer", do="nvidia-smi"
            ),
        ),
    )


def _registered(tried: Sequence[Registration], wanted: Wanted) -> str:
    rate = max((one.seconds or 0.0) / one.bytes for one in tried)
    whole = f"{rate * wanted.stage_bytes:.1f} s for a stage of {size_text(wanted.stage_bytes)}, once in each process"
    return f"{size_text(tried[0].bytes)}, mapped for writing and for reading, at {rate * 2**30:.3f} s a GiB: {whole}"


def _judge_link(name: str, pci: PciGpu, at_work: Link | None) -> Finding:
    check = f"PCIe link: {name}"
    now, best = at_work or pci.link, pci.best
    if now.raw_rate is None or best.raw_rate is None:
        return ok(check, f"the machine does not tell of the link of {pci.address}")
    found = f"{pci.address} at {now} of {best} {'while it copied' if at_work else 'while idle'}"
    narrowed, slowed = _below(now.width, best.width), _below(now.speed, best.speed)
    if narrowed or (slowed and at_work):
        device = f"/sys/bus/pci/devices/{pci.address}"
        return Finding(
            check=check,
            level=Level.WARNING,
            found=found,
            costs=f"copies take up to {best.raw_rate / now.raw_rate:.1f} times as long, both ways",
            remedies=(
                Remedy(
                    where="to see both ends of the link, as root",
                    do=f"lspci -vv -s {pci.address} | grep -e LnkCap -e LnkSta",
                ),
                Remedy(where="to see whether it has errors", do=f"cat {device}/aer_dev_correctable"),
                Remedy(
                    where="at the machine",
                    do="seat the card anew; set its slot to full speed and width in the firmware",
                ),
            ),
        )
    slot = f"; the GPU itself can {pci.device_best}" if pci.device_best != best else ""
    return ok(check, found + slot)


def _judge_copies(index: int, copies: Copies, pci: PciGpu | None, wanted: Wanted) -> Finding:
    check = f"copies: GPU {index}"
    if copies.wrong_to_host or copies.wrong_from_host:
        return Finding(
            check=check,
            level=Level.ERROR,
            found=f"{copies.wrong_to_host} bytes came to host memory changed, {copies.wrong_from_host} to the GPU",
            costs="engines would compute with weights that nobody has trained",
            remedies=(_DRIVER_ERRORS, Remedy(where="to test the GPU", do="dcgmi diag -r 3")),
        )
    to_host, from_host = statistics.median(copies.to_host), statistics.median(copies.from_host)
    figures = f"{to_host / 1e9:.1f} GB/s to host memory, {from_host / 1e9:.1f} GB/s from it"
    usable, slower = pci.usable if pci else None, min(to_host, from_host)
    if usable is None or slower > IMPLAUSIBLE_SHARE * usable:
        return ok(check, f"{figures}; the machine does not tell what the link carries")
    found = (
        f"{figures}: {to_host / usable:.2f} and {from_host / usable:.2f} of the {usable / 1e9:.1f} GB/s that the link "
        f"should carry ({usable / USABLE_SHARE / 1e9:.1f} GB/s after encoding, times {USABLE_SHARE})"
    )
    if slower >= FAST_SHARE * usable:
        return ok(check, found)
    costs = _slow(to_host, from_host, usable, wanted)
    return Finding(check=check, level=Level.WARNING, found=found, costs=costs, remedies=_faster(pci))


def _slow(to_host: float, from_host: float, usable: float, wanted: Wanted) -> str:
    size = wanted.version_bytes
    flush, read, should = size / to_host, size / from_host, size / usable
    return (
        f"over this link alone a version of {size_text(size)} is flushed in {flush:.2f} s and read in {read:.2f} s, "
        f"instead of {should:.2f} s"
    )


def _faster(pci: PciGpu | None) -> tuple[Remedy, ...]:
    busy = Remedy(where="once nothing else uses the GPU and its link, to measure again", do="stagingd doctor")
    if pci is None or pci.node is None:
        return (busy,)
    near = f"numactl --cpunodebind={pci.node} --membind={pci.node} stagingd doctor"
    return (busy, Remedy(where="to see whether memory of its own NUMA node is faster", do=near))


def _below(now: float | None, best: float | None) -> bool:
    return now is not None and best is not None and now < best
