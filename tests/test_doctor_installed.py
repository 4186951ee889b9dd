# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""`stagingd doctor`: versions of what is installed, against those that are known."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from machines import machine
from stagingd_vllm.versions import Standing, standing

from stagingd.doctor.finding import Finding, Level
from stagingd.doctor.installed import PYTHON_RUN, TITAN, TORCH, VLLM, Installed, judge_installed, read_installed
from stagingd.machine.files import Files

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def judged(python: str = "3.12.3", stagingd: str | None = "0.1.0", **versions: str | None) -> dict[str, Finding]:
    packages = {"torch": "2.11.0", "vLLM": "0.26.0", "TorchTitan": "0.3.0"} | versions
    found = judge_installed(Installed(python=python, stagingd=stagingd, packages=packages, driver="580.159.04"))
    return {finding.check: finding for finding in found}


def test_versions_that_have_been_run_are_no_finding() -> None:
    assert {finding.level for finding in judged().values()} == {Level.OK}
    assert "580.159.04" in judged()["driver"].found


@pytest.mark.parametrize(
    ("package", "version", "level"),
    [
        ("torch", "2.13.0+cpu", Level.OK),
        ("torch", "2.10.1", Level.ERROR),
        ("torch", "2.12.0", Level.NOTE),
        ("torch", "2.14.0", Level.WARNING),
        ("torch", None, Level.NOTE),
        ("vLLM", "0.32.0+cpu", Level.OK),
        ("vLLM", "0.25.3", Level.ERROR),
        ("vLLM", "0.33.1", Level.NOTE),
        ("vLLM", "0.34.0", Level.WARNING),
        ("vLLM", "1.0.0", Level.WARNING),
        ("TorchTitan", "0.2.2", Level.OK),
        ("TorchTitan", "0.2.1", Level.ERROR),
        ("TorchTitan", "0.2.3", Level.NOTE),
        ("TorchTitan", "0.4.0", Level.WARNING),
    ],
)
def test_other_versions_are_told_of_by_how_well_they_are_known(package: str, version: str | None, level: Level) -> None:
    found = judged(**{package: version})[package]
    assert found.level is level
    if level is not Level.OK:
        assert any("pip install" in remedy.do for remedy in found.remedies)


def test_a_python_that_nobody_has_tried_is_a_note() -> None:
    assert judged(python="3.15.0")["Python"].level is Level.NOTE


def test_stagingd_may_run_from_a_source_tree_that_nobody_installed() -> None:
    python = judged(stagingd=None)["Python"]
    assert python.level is Level.OK
    assert "from a source tree" in python.found


@pytest.mark.parametrize("minor", range(20, 40))
def test_what_is_known_of_vllm_is_what_the_engines_side_knows(minor: int) -> None:
    version = f"0.{minor}.0"
    expected = {Standing.RUN: (Level.OK,), Standing.READ: (Level.NOTE,), Standing.UNKNOWN: (Level.WARNING, Level.ERROR)}
    assert judged(vLLM=version)["vLLM"].level in expected[standing(version)]


def test_the_oldest_versions_are_those_that_the_package_asks_for() -> None:
    asked = {wanted for extra in PROJECT["optional-dependencies"].values() for wanted in extra}
    for known in (TORCH, VLLM, TITAN):
        assert f"{known.distributions[0]}>={'.'.join(map(str, known.least))}" in asked
        assert known.extra in PROJECT["optional-dependencies"]
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, PYTHON_RUN[0]))}"


def test_what_is_installed_here_is_read_without_importing_it() -> None:
    found = read_installed(Files())
    assert found.packages["torch"] == metadata.version("torch")
    assert found.packages["vLLM"] is not None
    assert found.python == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Wed Jul  9 12:00:00 UTC 2026",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)",
    ],
)
def test_the_drivers_version_is_read_of_either_kind_of_module(tmp_path: Path, line: str) -> None:
    assert (
        read_installed(machine(tmp_path, {"proc/driver/nvidia/version": f"{line}\nGCC version: 12.2.0"})).driver
        == "580.65.06"
    )
    assert read_installed(machine(tmp_path / "none")).driver is None
