# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""`stagingd doctor`, as people run it, and the trial of GPUs that it starts."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from daemons import DEADLINE_S, eventually
from hypothesis import given
from hypothesis import strategies as st
from machines import machine, memory, mounts, process
from pydantic import ValidationError
from rich.console import Console
from stagingd_client import gpu_check, trial_memory
from stagingd_client.trial_memory import Copy, measure, shared_memory
from test_cli import stagingd

from stagingd.config import Settings
from stagingd.doctor import gpus
from stagingd.doctor.answer import Answer, State
from stagingd.doctor.display import show
from stagingd.doctor.examination import examine_host
from stagingd.doctor.finding import Finding, Level, Remedy, Report
from stagingd.doctor.gpu_process import GpuCheckFailed, try_gpus
from stagingd.doctor.gpu_report import GpuReport
from stagingd.doctor.wanted import Wanted
from stagingd.segment import SHARED_MEMORY

CPU = torch.device("cpu")
CHECKS = {
    "size",
    "daemon",
    "locking limit",
    "room in memory",
    "room in /dev/shm",
    "memory limit",
    "huge pages",
    "swap",
    "runtime folder",
    "group",
    "/dev/shm",
    "segments",
    "pid namespace",
    "descriptors",
    "NUMA nodes",
    "Python",
    "torch",
    "vLLM",
    "TorchTitan",
    "driver",
    "GPUs",
}


def finding(level: Level, check: str = "swap") -> Finding:
    return Finding(check=check, level=level, found="f", costs="c", remedies=(Remedy(where="w", do="a\nb"),))


def test_the_command_tells_all_of_this_machine_as_one_object(tmp_path: Path) -> None:
    told = stagingd("doctor", "--runtime-dir", str(tmp_path / "run"), "--json", "--stage-bytes", "4096")
    report = Report.model_validate_json(told.stdout.splitlines()[-1])
    checks = [finding.check for finding in report.findings]
    assert set(checks) >= CHECKS
    assert len(checks) == len(set(checks))
    assert told.returncode == int(not report.fit)
    assert report.wanted.stage_bytes == 4096
    by_check = {finding.check: finding for finding in report.findings}
    assert by_check["daemon"].level is Level.NOTE
    if torch.version.cuda is None:
        assert f"torch {torch.__version__}, built for CPUs" in by_check["GPUs"].found
    assert all(finding.check in told.stderr for finding in report.findings)
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "run").exists()


def test_what_keeps_it_from_running_ends_it_with_status_1_and_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    told = stagingd("doctor", "--runtime-dir", str(tmp_path), "--size-gib", "1000000")
    assert told.returncode == 1
    assert f"chmod o-w {tmp_path}" in told.stdout
    assert "not fit to run" in told.stdout.splitlines()[-1]
    assert "room in /dev/shm, runtime folder" in told.stdout.splitlines()[-1]


def test_a_daemon_out_of_sight_is_not_judged_by_the_limits_of_this_process(tmp_path: Path) -> None:
    files = machine(tmp_path, memory(), mounts(), process(locked_limit="65536", locked_hard="65536"), process(4711))
    (tmp_path / "dev/shm").mkdir(parents=True)
    settings = Settings(runtime_dir=tmp_path / "run")
    serves = Answer(path=str(settings.control_socket), state=State.SERVES)

    def checks(answer: Answer) -> dict[str, Finding]:
        return {found.check: found for found in examine_host(Wanted.of(16.0, None), settings, answer, files)}

    assert "locking limit" not in checks(serves)
    assert checks(serves)["limits"].level is Level.NOTE
    seen = checks(serves.model_copy(update={"pid": 4711}))
    assert "the daemon (pid 4711)" in seen["locking limit"].found
    assert "limits" not in seen


@pytest.mark.parametrize("options", [("--size-gib", "1", "--stage-bytes", "2"), ("--size-gib", "0")])
def test_sizes_that_make_no_sense_are_wrong_use(options: tuple[str, ...]) -> None:
    assert stagingd("doctor", *options).returncode == 2


@given(st.lists(st.sampled_from(list(Level))))
def test_only_errors_count_and_warnings_if_asked(levels: list[Level]) -> None:
    report = Report.of(Wanted.of(None, None), tuple(finding(level) for level in levels))
    assert report.exit_status(strict=False) == int(Level.ERROR in levels) == int(not report.fit)
    assert report.exit_status(strict=True) == int(Level.ERROR in levels or Level.WARNING in levels)


def test_a_finding_without_a_cost_or_a_remedy_is_refused() -> None:
    with pytest.raises(ValidationError, match="must say what it costs and what to do"):
        Finding(check="swap", level=Level.NOTE, found="f", costs="c")
    with pytest.raises(ValidationError, match="must say what it costs and what to do"):
        Finding(check="swap", level=Level.ERROR, found="f", remedies=(Remedy(where="w", do="d"),))


def test_findings_are_shown_whole_and_their_brackets_are_not_taken_for_colours() -> None:
    console = Console(width=40, record=True, file=io.StringIO())
    long = Finding(
        check="swap",
        level=Level.WARNING,
        found="found",
        costs="costs",
        remedies=(Remedy(where="in the unit", do="[Service]\nLimitMEMLOCK=infinity" + "x" * 60),),
    )
    show(Report.of(Wanted.of(None, None), (long,)), console)
    lines = console.export_text().splitlines()
    assert lines[0] == "warning  swap: found"
    assert lines[1].split() == ["costs", "costs"]
    assert "in the unit: [Service]" in lines[2]
    assert lines[3].strip() == "LimitMEMLOCK=infinity" + "x" * 60
    assert lines[-1] == "fit to run: no errors; 1 warning (swap)"


def test_the_trial_of_gpus_says_so_where_torch_is_built_for_cpus() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: see test_doctor_on_gpu.py")
    report = gpu_check.check(1)
    assert (report.torch, report.torch_cuda, report.driver_cuda, report.gpus) == (torch.__version__, None, None, ())
    assert report.problem == "Torch not compiled with CUDA enabled"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("import signal; signal.raise_signal(signal.SIGALRM)", "did not end within 1 s"),
        ("raise SystemExit('no such library')", "ended with status 1: no such library"),
        ("print('{}')", "printed no report"),
        ("pass", "printed no report"),
    ],
)
def test_a_trial_that_fails_is_a_finding_with_its_last_words(
    script: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagingd.doctor.gpu_process.GRACE_S", 0.1)
    with pytest.raises(GpuCheckFailed) as failed:
        try_gpus([sys.executable, "-S", "-c", script], deadline_s=1)
    assert says in failed.value.what
    (found,) = gpus.judge_failure(failed.value, [])
    assert found.level is Level.ERROR
    assert says in found.found


def test_a_trial_that_cannot_be_started_is_a_finding(tmp_path: Path) -> None:
    with pytest.raises(GpuCheckFailed, match="does not start: No such file"):
        try_gpus([str(tmp_path / "python")])


def test_the_trial_ends_itself_at_its_deadline_whatever_holds_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--deadline-s", "1"])
    monkeypatch.setattr(gpu_check, "check", lambda copies: time.sleep(2 * DEADLINE_S))
    child = os.fork()  # another interpreter would import torch again
    if child == 0:
        gpu_check.main()
        os._exit(0)
    try:
        _, status = eventually(lambda: (ended := os.waitpid(child, os.WNOHANG))[0] and ended, "the trial to end")
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        raise
    assert os.WTERMSIG(status) == signal.SIGALRM


def plain_copy(target: torch.Tensor, source: torch.Tensor) -> float:
    target.copy_(source)
    return 0.5


def test_copies_are_compared_and_their_speed_is_bytes_a_second() -> None:
    found = measure(shared_memory(2**16), CPU, plain_copy, 3)
    assert found.wrong_to_host == found.wrong_from_host == 0
    assert found.to_host == found.from_host == (2**17,) * 3


def test_the_two_mappings_are_of_one_memory_that_has_no_name() -> None:
    before = set(SHARED_MEMORY.glob("stagingd-trial-*"))
    memory = shared_memory(2**16)
    memory.written.fill_(7)
    assert memory.read.min() == 7
    assert memory.first(16).read.numel() == 16
    assert set(SHARED_MEMORY.glob("stagingd-trial-*")) <= before


def leaves_out(part: slice, *, to_host: bool) -> Callable[[], Copy]:
    """A copy that does not bring a part over, in one direction: from memory that is only read, or into it."""

    def make() -> Copy:
        calls = 0

        def copy(target: torch.Tensor, source: torch.Tensor) -> float:
            nonlocal calls
            calls += 1
            kept = target[part].clone()
            target.copy_(source)
            if (calls % 2 == 1) is to_host:
                target[part] = kept
            return 0.5

        return copy

    return make


@pytest.mark.parametrize("part", [slice(None), slice(-256, None), slice(0, 4096)])
@pytest.mark.parametrize("to_host", [True, False])
def test_bytes_that_were_not_brought_over_are_counted(part: slice, to_host: bool) -> None:
    found = measure(shared_memory(2**16), CPU, leaves_out(part, to_host=to_host)(), 2)
    wrong, right = (
        (found.wrong_to_host, found.wrong_from_host) if to_host else (found.wrong_from_host, found.wrong_to_host)
    )
    assert right == 0
    assert wrong > 0.9 * 3 * len(range(2**16)[part])


def test_memory_for_trials_leaves_room_and_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tight:
        f_bavail, f_frsize = 20_000, 4096

    monkeypatch.setattr(trial_memory.os, "statvfs", lambda _: Tight)
    assert shared_memory().written.numel() == 5000 * 4096
    Tight.f_bavail = 10_000
    with pytest.raises(OSError, match="less than 64 MiB are free"):
        shared_memory()


def test_the_report_crosses_the_process_boundary_unchanged() -> None:
    report = GpuReport(torch="2", torch_cuda=None, driver_cuda=None, problem="p", remedy=None, gpus=())
    assert GpuReport.model_validate_json(json.dumps(json.loads(report.model_dump_json()))) == report
