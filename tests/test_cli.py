# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The command: what people type, and what they are told when it cannot be done."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from daemons import RunningDaemon
from stagingd_client import Stage

ROOT = Path(__file__).parent.parent


def stagingd(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stagingd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_status_shows_stages_to_people_and_to_programs(daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage:
        stage.declare({"w": torch.zeros(8, 4)})
        stage.begin(17)
        stage.put("w", torch.zeros(8, 4))
        stage.commit().wait()
        shown = stagingd("status", "--runtime-dir", str(daemon.folder))
        assert shown.returncode == 0, shown.stderr
        assert stage_name in shown.stdout
        assert "17" in shown.stdout
        told = stagingd("status", "--runtime-dir", str(daemon.folder), "--json")
        assert json.loads(told.stdout)["stages"][-1]["slots"][0]["version"] == 17


def test_drop_gives_a_stage_back_and_refuses_one_that_is_not_there(daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage:
        stage.declare({"w": torch.zeros(8, 4)})
    dropped = stagingd("drop", stage_name, "--runtime-dir", str(daemon.folder))
    assert dropped.returncode == 0, dropped.stderr
    again = stagingd("drop", stage_name, "--runtime-dir", str(daemon.folder))
    assert again.returncode == 1
    assert again.stderr.startswith(f"stagingd: there is no stage {stage_name!r}")
    assert "Traceback" not in again.stderr


def test_no_daemon_is_one_line_and_status_1(tmp_path: Path) -> None:
    shown = stagingd("status", "--runtime-dir", str(tmp_path))
    assert shown.returncode == 1
    assert shown.stderr.count("\n") == 1
    assert "Start the daemon (stagingd serve)" in shown.stderr


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    shown = stagingd("serve", "--runtime-dir", str(tmp_path), "--lease-s", "-1")
    assert shown.returncode == 2
    assert "setting lease_s" in shown.stderr


def test_a_group_that_does_not_exist_is_named(tmp_path: Path) -> None:
    shown = stagingd("serve", "--runtime-dir", str(tmp_path), "--group", "no-such-group")
    assert shown.returncode == 2
    assert "there is no Unix group 'no-such-group'" in shown.stderr


def test_a_runtime_directory_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    shown = stagingd("serve", "--runtime-dir", str(tmp_path))
    assert shown.returncode == 1
    assert "may be written by everybody" in shown.stderr


def test_the_daemon_never_imports_torch() -> None:
    script = "import sys, stagingd.cli; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("stagingd", {"torch", "vllm", "stagingd_client", "stagingd_vllm"}),
        ("client/stagingd_client", {"vllm", "stagingd_vllm"}),
        ("vllm_ext/stagingd_vllm", {"stagingd_client"}),
    ],
)
def test_imports_run_one_way(package: str, forbidden: set[str]) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, path
