# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""GPUs: which there are, which torch sees, and what came of trying them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.gpu_process import BY_HAND, GpuCheckFailed
from stagingd.doctor.gpu_report import GpuReport
from stagingd.doctor.pci import PciGpu
from stagingd.doctor.subject import Place, Subject
from stagingd.doctor.trials import judge_idle_link, judge_trial
from stagingd.doctor.wanted import Wanted

CHECK: Final = "GPUs"


def judge_untried(gpus: Sequence[PciGpu]) -> list[Finding]:
    """What can be said where torch is not installed."""
    count = f"{len(gpus)} on the PCI bus" if gpus else "none on the PCI bus"
    untried = Finding(
        check=CHECK,
        level=Level.NOTE,
        found=f"{count}; torch is not installed here, so registration and copies were not tried",
        costs="nothing for a daemon; whether GPUs reach its memory at full speed is not known",
        remedies=(Remedy(where="in the environment of trainers or engines", do="stagingd doctor"),),
    )
    return [untried, *(judge_idle_link(gpu) for gpu in gpus)]


def judge_failure(failure: GpuCheckFailed, gpus: Sequence[PciGpu]) -> list[Finding]:
    """What can be said where the trial failed."""
    failed = Finding(
        check=CHECK,
        level=Level.ERROR,
        found=failure.what,
        costs="trainers and engines of this environment are likely to fail as it did",
        remedies=(Remedy(where="to see all that it prints", do=BY_HAND),),
    )
    return [failed, *(judge_idle_link(gpu) for gpu in gpus)]


def judge_gpus(report: GpuReport, pci: Sequence[PciGpu], subject: Subject, wanted: Wanted) -> list[Finding]:
    """All that was tried.

    Args:
        report: what came of it.
        pci: what the PCI bus shows.
        subject: a process as those that use GPUs, whose limits count.
        wanted: the size by which costs are reckoned.
    """
    by_address = {gpu.address: gpu for gpu in pci}
    findings = [_judge_seen(report, pci, subject)]
    for trial in report.gpus:
        findings += judge_trial(trial, by_address.pop(trial.address, None), subject, wanted)
    return [*findings, *(judge_idle_link(gpu) for gpu in by_address.values())]


def _judge_seen(report: GpuReport, pci: Sequence[PciGpu], subject: Subject) -> Finding:
    seen = {trial.address: trial.name for trial in report.gpus}
    hidden = [gpu.address for gpu in pci if gpu.address not in seen]
    why = f": {report.problem}" if report.problem else ""
    if seen and not hidden and not report.problem:
        return ok(CHECK, f"{len(seen)}: {', '.join(sorted(set(seen.values())))}; {_software(report)}")
    if not pci and not seen:
        return Finding(
            check=CHECK,
            level=Level.NOTE,
            found=f"none; {_software(report)}{why}",
            costs="nothing where trainers and engines run on CPUs; registration and copies were not tried",
            remedies=(Remedy(where="on a machine that has GPUs", do="stagingd doctor"),),
        )
    return Finding(
        check=CHECK,
        level=Level.WARNING if report.problem or not seen else Level.NOTE,
        found=f"torch sees {len(seen)}"
        + (f" of {len(pci)}, not {', '.join(hidden)}" if hidden else "")
        + f"; {_software(report)}{why}",
        costs="trainers and engines of this environment cannot use those, and they were not tried",
        remedies=_made_visible(report, subject),
    )


def _software(report: GpuReport) -> str:
    built = f"built for CUDA {report.torch_cuda}" if report.torch_cuda else "built for CPUs"
    driver = f"a driver for CUDA {report.driver_cuda}" if report.driver_cuda else "no driver"
    return f"torch {report.torch}, {built}, and {driver}"


def _made_visible(report: GpuReport, subject: Subject) -> tuple[Remedy, ...]:
    if report.remedy:
        return (Remedy(where="in this environment", do=report.remedy),)
    if report.torch_cuda is None:
        return (
            Remedy(
                where="in this environment, from an index that has builds for CUDA",
                do="pip install --force-reinstall torch",
            ),
        )
    named = Remedy(where="if this variable leaves some out", do="unset CUDA_VISIBLE_DEVICES")
    if subject.place is Place.CONTAINER:
        return (Remedy(where="docker run", do="--gpus all"), named)
    if subject.place is Place.POD:
        limit = 'resources: {limits: {nvidia.com/gpu: "8"}}'
        return (Remedy(where="in the pod's specification, at the container", do=limit), named)
    return (named, Remedy(where="to see whether the driver works, and which version it is", do="nvidia-smi"))
