# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""`stagingd doctor`: what is found of GPUs, their links and their NUMA nodes, on small machines."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import gpu, machine, nodes, process

from stagingd.doctor.finding import Finding, Level
from stagingd.doctor.gpu_report import Copies, GpuReport, GpuTrial, Registration
from stagingd.doctor.gpus import judge_gpus, judge_untried
from stagingd.doctor.numa import judge_numa, read_nodes
from stagingd.doctor.pci import Link, PciGpu, read_gpus, read_link
from stagingd.doctor.subject import read_subject
from stagingd.doctor.wanted import Wanted

FIRST, SECOND = "0000:17:00.0", "0000:b1:00.0"
WANTED = Wanted.of(16.0, None)
FULL = Link(speed=32.0, width=16)


def commands(finding: Finding) -> str:
    return "\n".join(remedy.do for remedy in finding.remedies)


def only(root: Path, **described: object) -> PciGpu:
    (found,) = read_gpus(machine(root, gpu(FIRST, **described)))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("speed", "width", "rate"),
    [(2.5, 16, 4.0), (5.0, 16, 8.0), (8.0, 16, 15.75), (16.0, 16, 31.51), (32.0, 16, 63.02), (64.0, 16, 121.0)],
)
def test_the_raw_rate_is_that_of_the_specification(speed: float, width: int, rate: float) -> None:
    assert Link(speed=speed, width=width).raw_rate == pytest.approx(rate * 1e9, rel=1e-3)


@given(st.sampled_from([2.5, 5.0, 8.0, 16.0, 32.0]), st.sampled_from([1, 2, 4, 8]))
def test_more_lanes_and_a_faster_link_carry_more(speed: float, width: int) -> None:
    rate = Link(speed=speed, width=width).raw_rate
    wider, faster = Link(speed=speed, width=2 * width).raw_rate, Link(speed=2 * speed, width=width).raw_rate
    assert rate is not None
    assert wider == 2 * rate
    assert faster is not None
    assert faster >= 2 * 0.94 * rate


def test_what_a_link_of_the_fifth_generation_should_carry_is_what_was_measured(tmp_path: Path) -> None:
    usable = only(tmp_path).usable
    assert usable is not None
    assert 54e9 < usable < 55.5e9


def test_only_nvidias_display_devices_are_gpus(tmp_path: Path) -> None:
    network = {
        f"sys/bus/pci/devices/0000:03:00.0/{name}": text for name, text in (("vendor", "0x10de"), ("class", "0x020700"))
    }
    other = {
        f"sys/bus/pci/devices/0000:04:00.0/{name}": text for name, text in (("vendor", "0x1002"), ("class", "0x030000"))
    }
    files = machine(tmp_path, network, other, gpu(SECOND, 1, port_address="0000:80:01.0"), gpu(FIRST))
    assert [(found.address, found.node) for found in read_gpus(files)] == [(FIRST, 0), (SECOND, 1)]


def test_a_slower_port_limits_what_a_link_can(tmp_path: Path) -> None:
    found = only(tmp_path, port=("16.0 GT/s PCIe", "8"))
    assert found.best == Link(speed=16.0, width=8)
    assert found.device_best == FULL
    assert found.usable == pytest.approx(0.87 * 16e9 * 128 / 130, rel=1e-3)


def test_a_machine_that_does_not_tell_of_links_or_nodes_is_believed(tmp_path: Path) -> None:
    found = only(tmp_path, node=-1, now=("Unknown", "0"), best=("Unknown", "255"), port=("Unknown", "0"))
    assert found == PciGpu(address=FIRST, node=None, link=NOT_TOLD, device_best=NOT_TOLD, best=NOT_TOLD, usable=None)
    assert read_link(machine(tmp_path), "0000:ff:00.0") == NOT_TOLD


NOT_TOLD = Link(speed=None, width=None)


def good_trial(**changes: object) -> GpuTrial:
    registered = Registration(bytes=2**28, seconds=0.0085)
    copies = Copies(
        bytes=2**28, to_host=(55e9, 55.2e9, 55.4e9), from_host=(54e9, 55e9, 56e9), wrong_to_host=0, wrong_from_host=0
    )
    trial = GpuTrial(
        index=0,
        name="NVIDIA H200",
        address=FIRST,
        written=registered,
        read=registered,
        copies=copies,
        link_at_work=FULL,
    )
    return trial.model_copy(update=changes)


def report(*trials: GpuTrial, **changes: object) -> GpuReport:
    found = GpuReport(
        torch="2.11.0+cu130", torch_cuda="13.0", driver_cuda="13.0", problem=None, remedy=None, gpus=trials
    )
    return found.model_copy(update=changes)


def judged(root: Path, told: GpuReport, *shown: PciGpu) -> dict[str, Finding]:
    own = read_subject(machine(root / "own", process(locked_limit="65536", locked_hard="65536")), None)
    findings = judge_gpus(told, shown, own, WANTED)
    return {finding.check: finding for finding in findings}


def test_a_gpu_that_does_as_it_should_is_no_finding(tmp_path: Path) -> None:
    found = judged(tmp_path, report(good_trial()), only(tmp_path))
    assert {finding.level for finding in found.values()} == {Level.OK}
    assert set(found) == {"GPUs", "registration: GPU 0", "PCIe link: GPU 0", "copies: GPU 0"}
    assert "0.034 s a GiB: 1.1 s for a stage of 32.224 GiB" in found["registration: GPU 0"].found
    assert "1.01 and 1.00 of the 54.8 GB/s" in found["copies: GPU 0"].found


def test_the_median_of_copies_is_held_against_nine_tenths_of_the_link(tmp_path: Path) -> None:
    usable = only(tmp_path).usable
    assert usable is not None
    for share, level in ((0.91, Level.OK), (0.89, Level.WARNING)):
        speeds = (share * usable, 0.1 * usable, 1.0 * usable)
        assert statistics.median(speeds) == share * usable
        for direction in ("to_host", "from_host"):
            copies = good_trial().copies
            assert copies is not None
            trial = good_trial(copies=copies.model_copy(update={direction: speeds}))
            found = judged(tmp_path, report(trial), only(tmp_path))["copies: GPU 0"]
            assert found.level is level, direction


def test_slow_copies_say_how_much_longer_a_version_takes(tmp_path: Path) -> None:
    slow = Copies(bytes=2**28, to_host=(20e9,), from_host=(10e9,), wrong_to_host=0, wrong_from_host=0)
    found = judged(tmp_path, report(good_trial(copies=slow)), only(tmp_path, node=1))["copies: GPU 0"]
    assert "flushed in 0.86 s and read in 1.72 s, instead of 0.31 s" in found.costs
    assert "numactl --cpunodebind=1 --membind=1 stagingd doctor" in commands(found)


def test_bytes_that_arrive_changed_are_an_error_however_fast_they_are(tmp_path: Path) -> None:
    for direction in ("wrong_to_host", "wrong_from_host"):
        copies = good_trial().copies
        assert copies is not None
        trial = good_trial(copies=copies.model_copy(update={direction: 1}))
        assert judged(tmp_path, report(trial), only(tmp_path))["copies: GPU 0"].level is Level.ERROR


def test_copies_faster_than_the_link_show_that_the_machine_is_wrong_about_it(tmp_path: Path) -> None:
    found = judged(tmp_path, report(good_trial()), only(tmp_path, port=("2.5 GT/s PCIe", "1")))["copies: GPU 0"]
    assert found.level is Level.OK
    assert "does not tell" in found.found


def test_a_link_that_lost_lanes_is_found_at_work_and_idle(tmp_path: Path) -> None:
    narrow = only(tmp_path, now=("32.0 GT/s PCIe", "8"))
    at_work = judged(tmp_path, report(good_trial(link_at_work=narrow.link)), narrow)["PCIe link: GPU 0"]
    assert at_work.level is Level.WARNING
    assert "32.0 GT/s x8 of 32.0 GT/s x16 while it copied" in at_work.found
    assert "2.0 times as long" in at_work.costs
    (_, idle) = judge_untried([narrow])
    assert idle.level is Level.WARNING


def test_a_slower_link_is_a_finding_at_work_only_since_idle_gpus_lower_it(tmp_path: Path) -> None:
    idle = only(tmp_path, now=("2.5 GT/s PCIe", "16"))
    assert judge_untried([idle])[1].level is Level.OK
    assert judged(tmp_path, report(good_trial()), idle)["PCIe link: GPU 0"].level is Level.OK
    slow = good_trial(link_at_work=Link(speed=16.0, width=16))
    assert judged(tmp_path, report(slow), idle)["PCIe link: GPU 0"].level is Level.WARNING


def test_a_refused_registration_keeps_engines_out_and_slows_trainers(tmp_path: Path) -> None:
    refused = Registration(bytes=2**28, problem="cudaHostRegister refused 0.25 GiB: cudaErrorMemoryAllocation")
    engines = judged(tmp_path, report(good_trial(read=refused, copies=None)), only(tmp_path))["registration: GPU 0"]
    assert engines.level is Level.ERROR
    assert "cudaErrorMemoryAllocation" in engines.found
    assert "prlimit --memlock=unlimited" in commands(engines)
    trainers = judged(tmp_path, report(good_trial(written=refused, copies=None)), only(tmp_path))
    assert trainers["registration: GPU 0"].level is Level.WARNING
    assert "copies: GPU 0" not in trainers


def test_a_trial_that_ends_before_its_time_is_an_error_with_its_reason(tmp_path: Path) -> None:
    trial = good_trial(problem="cudaErrorLaunchFailure", written=None, read=None, copies=None, link_at_work=None)
    found = judged(tmp_path, report(trial), only(tmp_path))
    assert found["trial: GPU 0"].level is Level.ERROR
    assert "cudaErrorLaunchFailure" in found["trial: GPU 0"].found
    assert "registration: GPU 0" not in found


def test_a_gpu_whose_memory_others_have_is_a_warning(tmp_path: Path) -> None:
    trial = good_trial(problem="only 3 MiB of its memory are free", short_of_memory=True, copies=None)
    assert judged(tmp_path, report(trial), only(tmp_path))["trial: GPU 0"].level is Level.WARNING


def test_a_machine_without_gpus_is_a_note(tmp_path: Path) -> None:
    cpu = report(torch="2.13.0+cpu", torch_cuda=None, driver_cuda=None, problem="Torch not compiled with CUDA enabled")
    found = judged(tmp_path, cpu)["GPUs"]
    assert found.level is Level.NOTE
    assert "not compiled" in found.found
    assert judge_untried([])[0].level is Level.NOTE


@pytest.mark.parametrize(
    ("told", "level", "remedy"),
    [
        (
            report(torch_cuda=None, problem="Torch not compiled with CUDA enabled"),
            Level.WARNING,
            "--force-reinstall torch",
        ),
        (report(problem="the driver is too old"), Level.WARNING, "nvidia-smi"),
        (report(problem="No module named 'cuda'", remedy="pip install cuda-bindings"), Level.WARNING, "cuda-bindings"),
        (report(good_trial(address=SECOND)), Level.NOTE, "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_torch_does_not_see_are_named(tmp_path: Path, told: GpuReport, level: Level, remedy: str) -> None:
    found = judged(tmp_path, told, only(tmp_path))
    assert found["GPUs"].level is level
    assert FIRST in found["GPUs"].found
    assert remedy in commands(found["GPUs"])
    assert f"PCIe link: GPU {FIRST}" in found


BOTH = gpu(FIRST, 0), gpu(SECOND, 1, port_address="0000:80:01.0")


def numa(root: Path, allowed: str, *gpus: dict[str, str], cgroup: str = "0::/user.slice", cpus: str = "0-7") -> Finding:
    files = machine(root, nodes("0-3", "4-7"), process(nodes=allowed, cgroup=cgroup, cpus=cpus), *gpus)
    (found,) = judge_numa(read_nodes(files), read_gpus(files), read_subject(files, None))
    return found


def test_a_gpu_at_a_node_whose_memory_the_daemon_may_not_have_is_a_warning_that_names_it(tmp_path: Path) -> None:
    found = numa(tmp_path, "0", *BOTH)
    assert found.level is Level.WARNING
    assert f"{SECOND} (node 1)" in found.found
    assert FIRST not in found.found
    assert "systemctl enable --now stagingd@1" in commands(found)
    assert "NUMAMask=1" in commands(found)
    assert "STAGINGD_RUNTIME_DIR=/run/stagingd-1" in commands(found)
    assert "numactl --interleave" not in commands(found)


def test_a_gpu_at_a_node_that_the_daemon_does_not_run_on_is_a_warning_too(tmp_path: Path) -> None:
    found = numa(tmp_path, "0-1", *BOTH, cpus="0-3")
    assert found.level is Level.WARNING
    assert f"{SECOND} (node 1)" in found.found
    assert "numactl --interleave=all stagingd serve" in commands(found)


def test_of_several_daemons_one_for_each_node_none_is_warned_of(tmp_path: Path) -> None:
    found = numa(tmp_path, "0-1", *BOTH, cpus="0-3", cgroup="0::/system.slice/stagingd@0.service")
    assert found.level is Level.NOTE


def test_gpus_at_the_one_node_that_the_daemon_uses_are_no_finding(tmp_path: Path) -> None:
    assert numa(tmp_path, "0-1", gpu(FIRST, 0), cpus="0-3").level is Level.OK


def test_a_daemon_that_runs_on_all_nodes_is_told_to_spread_its_pages_unless_its_unit_does(tmp_path: Path) -> None:
    by_hand = numa(tmp_path / "a", "0-1", *BOTH)
    assert by_hand.level is Level.NOTE
    assert "numactl --interleave=all stagingd serve" in commands(by_hand)
    unit = "0::/system.slice/stagingd.service"
    assert numa(tmp_path / "b", "0-1", *BOTH, cgroup=unit).level is Level.OK
    assert numa(tmp_path / "c", "0-1", *BOTH, cgroup=unit, cpus="0-3").level is Level.OK
    assert numa(tmp_path / "d", "0-1").level is Level.OK


def test_a_node_that_the_firmware_does_not_tell_is_a_note_on_machines_with_several(tmp_path: Path) -> None:
    assert numa(tmp_path, "0-1", gpu(FIRST, -1)).level is Level.NOTE
    single = machine(tmp_path / "single", nodes("0-7"), process(), gpu(FIRST, -1))
    (found,) = judge_numa(read_nodes(single), read_gpus(single), read_subject(single, None))
    assert found.level is Level.OK
