# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What `pip install stagingd` brings, and what the command puts on a machine from it."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from test_systemd import NAMES, PROGRAM, run, tool
from typer.testing import CliRunner

from stagingd import units
from stagingd.cli import app
from stagingd.units import PREFIXES, UnitsNotInstalled

ROOT = Path(__file__).parents[1]
ELSEWHERE = Path("/opt/stagingd/bin/stagingd")
SERVICE = {
    "systemd/system/stagingd.service",
    "systemd/system/stagingd@.service",
    "sysusers.d/stagingd.conf",
    "tmpfiles.d/stagingd.conf",
}


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    [built] = folder.glob("stagingd-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_packages_and_the_services_files(wheel: Path) -> None:
    installed = {name for name in below(wheel) if ".dist-info/" not in name}
    sources = {
        "stagingd": "stagingd",
        "client/stagingd_client": "stagingd_client",
        "vllm_ext/stagingd_vllm": "stagingd_vllm",
    }
    wanted = {f"{to}/{name}" for source, to in sources.items() for name in below(ROOT / source) if name.endswith(".py")}
    service = below(ROOT / "systemd")
    assert installed == wanted | {f"stagingd/systemd/{name}" for name in service}
    for name in service:
        assert (wheel / "stagingd/systemd" / name).read_bytes() == (ROOT / "systemd" / name).read_bytes(), name


def test_what_the_wheel_brings_installs_the_service_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stagingd", "install-units", "--root", str(tmp_path), "--program", str(ELSEWHERE)]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=60)
    assert below(tmp_path / "etc") == SERVICE


def test_the_daemon_imports_nothing_that_its_distribution_does_not_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[^A-Za-z0-9_-]", line)[0].replace("_", "-").lower() for line in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    imported = set[str]()
    for path in (ROOT / "stagingd").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"stagingd"}
    assert {distributions[name][0].replace("_", "-").lower() for name in outside} == named


# The service's files


def test_the_units_go_where_systemd_looks_and_start_the_program_that_they_are_given(tmp_path: Path) -> None:
    placed = units.install(ELSEWHERE, root=tmp_path)
    assert below(tmp_path / "etc") == SERVICE
    assert {str(one.path.relative_to(tmp_path / "etc")) for one in placed} == SERVICE
    for name in NAMES:
        text = (tmp_path / "etc/systemd/system" / name).read_text()
        assert text == (ROOT / "systemd" / name).read_text().replace("/usr/bin/stagingd", str(ELSEWHERE))
        assert f"ExecStart={ELSEWHERE} serve " in text
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*") if path.is_file()} == {0o644}


def test_the_program_is_that_of_the_environment_that_runs_the_command() -> None:
    assert units.this_program() == PROGRAM


@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_wrong_with_an_installed_unit(tmp_path: Path, name: str) -> None:
    for path, content in units.files(PROGRAM):
        (tmp_path / path.name).write_bytes(content)
    checked = run(tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", tmp_path / name)
    complaints = [line for line in checked.stderr.splitlines() if "stagingd" in line]  # others' units are not ours
    assert (checked.returncode, complaints) == (0, [])


def test_installing_twice_changes_nothing_and_a_file_that_differs_is_replaced(tmp_path: Path) -> None:
    first = units.install(ELSEWHERE, root=tmp_path)
    assert {one.outcome for one in first} == {"written"}
    changed = first[0].path
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*.*") if path.is_file()}
    assert {one.outcome for one in units.install(ELSEWHERE, root=tmp_path)} == {"unchanged"}
    assert {path: path.stat().st_ino for path in before} == before
    changed.write_text("old")
    again = {one.path: one.outcome for one in units.install(ELSEWHERE, root=tmp_path)}
    assert [path for path, outcome in again.items() if outcome == "replaced"] == [changed]
    assert changed.read_text() != "old"


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    arguments = ["install-units", "--root", str(tmp_path), "--prefix", "/usr/lib", "--program", str(ELSEWHERE)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    *placed, _, sysusers, reload, enable = done.stdout.splitlines()
    assert {line.split()[1] for line in placed} == {str(tmp_path / "usr/lib" / name) for name in SERVICE}
    commands = (sysusers.strip(), reload.strip(), enable.strip())
    assert commands == ("systemd-sysusers", "systemctl daemon-reload", "systemctl enable --now stagingd")


def test_a_prefix_where_systemd_does_not_look_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnitsNotInstalled, match="does not look for units in /srv/systemd/system") as refused:
        units.install(ELSEWHERE, root=tmp_path, prefix=Path("/srv"))
    assert all(prefix in refused.value.remedy for prefix in PREFIXES)
    assert not below(tmp_path)


@pytest.mark.parametrize("program", ["/home/somebody/bin/stagingd", "/root/x/stagingd", "/tmp/x/stagingd"])
def test_a_program_that_the_service_would_not_see_is_refused(tmp_path: Path, program: str) -> None:
    with pytest.raises(UnitsNotInstalled, match="which the service does not see"):
        units.install(Path(program), root=tmp_path)
    assert not below(tmp_path)


@pytest.mark.parametrize("name", ["stagingd", "python"])
def test_a_program_and_its_interpreter_are_looked_for_where_they_lie(tmp_path: Path, name: str) -> None:
    folder = Path("/dev/shm") / f"stagingd-test-{os.getpid()}"  # the test's own folder lies where the service is blind
    folder.mkdir()
    (folder / name).symlink_to(f"/home/somebody/bin/{name}")
    try:
        with pytest.raises(UnitsNotInstalled, match="lies in /home"):
            units.install(folder / "stagingd", root=tmp_path)
    finally:
        shutil.rmtree(folder)
    assert not below(tmp_path)


@pytest.mark.parametrize(
    "program", ["bin/stagingd", "/opt/my tools/stagingd", "/opt/100%/stagingd", "/opt/$x/stagingd"]
)
def test_a_path_that_a_unit_would_read_otherwise_is_refused(tmp_path: Path, program: str) -> None:
    with pytest.raises(UnitsNotInstalled, match="is no absolute path of letters"):
        units.install(Path(program), root=tmp_path)


def test_where_nothing_may_be_written_the_reason_is_told() -> None:
    with pytest.raises(UnitsNotInstalled, match=r"/sys/etc/.* cannot be written: .*Run the command as root"):
        units.install(ELSEWHERE, root=Path("/sys"))  # not even root may


# In a shell


@pytest.mark.parametrize(
    ("words", "completed"), [("stagingd stat", "status"), ("stagingd serve --runtime", "--runtime-dir")]
)
def test_a_shell_completes_commands_and_options(words: str, completed: str) -> None:
    environment = {
        "_STAGINGD_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [PROGRAM], capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )
    assert completed in done.stdout.split(), done.stderr
