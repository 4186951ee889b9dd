# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""`stagingd doctor` with real GPUs. ``pytest -m gpu`` on a machine that has some."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from test_cli import stagingd

from stagingd.doctor.finding import Level, Report
from stagingd.doctor.gpu_process import try_gpus

pytestmark = pytest.mark.gpu


def test_every_gpu_takes_shared_memory_and_copies_it_right_and_fast() -> None:
    report = try_gpus()
    assert len(report.gpus) == torch.cuda.device_count() > 0
    assert report.driver_cuda is not None
    for trial in report.gpus:
        assert trial.problem is None
        for registration in (trial.written, trial.read):
            assert registration is not None
            assert registration.problem is None
            assert registration.seconds
        copies = trial.copies
        assert copies is not None
        assert copies.wrong_to_host == copies.wrong_from_host == 0
        for direction in (copies.to_host, copies.from_host):
            assert statistics.median(direction) > 20e9, "registered memory: 10 to 20 GB/s is what unregistered has"
            print(trial.address, [round(rate / 1e9, 1) for rate in direction], trial.link_at_work)


def test_the_command_finds_nothing_against_gpus_that_work(tmp_path: Path) -> None:
    told = stagingd("doctor", "--runtime-dir", str(tmp_path / "run"), "--json", timeout_s=240)
    print(told.stderr)
    report = Report.model_validate_json(told.stdout.splitlines()[-1])
    by_check = {finding.check: finding for finding in report.findings}
    assert torch.cuda.device_count() > 0
    for index in range(torch.cuda.device_count()):
        assert by_check[f"registration: GPU {index}"].level is Level.OK
        assert by_check[f"copies: GPU {index}"].level is not Level.ERROR
