# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Shell commands of the pages that are not run: they are read by the very parsers that would read them, or marked.

They would train by TorchTitan, start an engine's server or ask one, install something, or change this machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import typer
from documents import ROOT
from signed import Workers, check
from typer.testing import CliRunner

from stagingd.cli import app

NOT_RUN = {
    "systemctl": "needs a running systemd, and root; tests/test_systemd.py has systemd's own tools check the units",
    "systemd-sysusers": "makes a user on this machine; tests/test_systemd.py runs it for another root",
    "usermod": "changes a user of this machine",
    "mount": "changes this machine's /dev/shm",
    "install": "makes a folder in /run; tests/test_deploy.py compares it with the manifests",
    "podman": "needs an image builder; tests/test_deploy.py reads the container file",
    "kubectl": "needs a cluster; tests/test_deploy.py reads the manifests",
    "python3 -m venv": "installs for the whole machine",
    "/opt/stagingd/bin/stagingd install-units": "writes to /etc; tests/test_packaging.py does so for another root",
}
"""Commands that cannot be run here, by how they begin, and why."""

Check = Callable[[Path, list[str]], None]
"""Checks a command, given the page's folder and the command's words."""


def words_of(command: str) -> list[str]:
    """A command's words, without what it sets in the environment."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def marked(command: str) -> str | None:
    return next((begins for begins in NOT_RUN if (command + " ").startswith(begins + " ")), None)


def checker(command: str) -> Check | None:
    plain = " ".join(words_of(command))
    return next((how for begins, how in CHECKS.items() if (plain + " ").startswith(begins + " ")), None)


def known_command(words: list[str]) -> None:
    """Whether ``stagingd`` has a command and its options; arguments may be left out."""
    group = typer.main.get_command(app)
    assert words[0] in group.commands, f"there is no command stagingd {words[0]}"
    options = {
        name for parameter in group.commands[words[0]].params for name in (*parameter.opts, *parameter.secondary_opts)
    }
    given = {word.split("=")[0] for word in words[1:] if word.startswith("-")} - {"--help"}
    assert given <= options, f"stagingd {words[0]} has no {given - options}"


def _pip(_: Path, words: list[str]) -> None:
    """An extra that does not exist would be a warning only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in words[words.index("install") + 1 :]:
        found = re.fullmatch(r"stagingd(?:\[([\w,]+)\])?", wanted)
        assert found is not None, wanted
        assert set(filter(None, (found[1] or "").split(","))) <= set(project["optional-dependencies"])


def _make(_: Path, words: list[str]) -> None:
    """Its targets are there. They are run by CI, and what `demo` does by tests/test_demo.py."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets)


def _example(_: Path, words: list[str]) -> None:
    """tests/test_examples.py runs it."""
    path = next(Path(word) for word in words if word.startswith("examples/"))
    assert (ROOT / path).exists()
    assert f'"{path.stem}"' in (ROOT / "tests/test_examples.py").read_text()


def _torchrun(folder: Path, words: list[str]) -> None:
    from torch.distributed.run import get_args_parser  # noqa: PLC0415

    given = get_args_parser().parse_args(words[1:])
    if not given.module:
        if given.training_script.startswith("examples/"):
            _example(folder, words)
        else:
            assert (folder / given.training_script).exists()
    else:
        assert importlib.util.find_spec(given.training_script) is not None
        torchtitan(folder, given.training_script_args)


def torchtitan(folder: Path, arguments: list[str]) -> None:
    """Read by the TorchTitan that is installed, or, for another version, as far as stagingd is concerned."""
    if "--override.imports" in arguments:  # of 0.3
        target, _, given = arguments[arguments.index("--override.imports") + 1].partition("=")
        source = (ROOT / "client" / f"{target.rpartition('.')[0].replace('.', '/')}.py").read_text()
        assert f"def {target.rpartition('.')[2]}(" in source
        from stagingd_client.torchtitan.settings import PublishingSettings  # noqa: PLC0415

        PublishingSettings(**json.loads(given))
        return
    from torchtitan.config import ConfigManager  # noqa: PLC0415

    with contextlib.chdir(folder):
        config = ConfigManager().parse_args(arguments)
    assert config.model.converters == ["stagingd"]


def _serve_vllm(_: Path, words: list[str]) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    given = make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])
    module, _, name = given.worker_extension_cls.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def _plan(folder: Path, words: list[str]) -> None:
    """Run, in this process: it has imported vLLM already."""
    from stagingd_vllm.plan_command import app as plan  # noqa: PLC0415

    with contextlib.chdir(folder):
        done = CliRunner().invoke(plan, words[3:], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def _follow(_: Path, words: list[str]) -> None:
    from stagingd_vllm.follow_command import app as follow  # noqa: PLC0415

    typer.main.get_command(follow).make_context("follow", words[3:])


def _curl(_: Path, words: list[str]) -> None:
    """The route is one of vLLM's, and the body one that stagingd's side of it takes."""
    from stagingd_vllm.engine import StagingdInitInfo, StagingdUpdateInfo  # noqa: PLC0415
    from vllm.entrypoints.rl.online.api_router import router as weights  # noqa: PLC0415
    from vllm.entrypoints.serve.dev.cache.api_router import router as cache  # noqa: PLC0415
    from vllm.entrypoints.serve.dev.rpc.api_router import router as rpc  # noqa: PLC0415

    path = next(urlsplit(word) for word in words if word.startswith("http")).path
    posts = {route.path for router in (weights, cache, rpc) for route in router.routes if "POST" in route.methods}
    assert path in posts
    body = json.loads(words[words.index("-d") + 1]) if "-d" in words else {}
    assert body or words[1:3] == ["-X", "POST"], "curl asks with GET"
    match path:
        case "/collective_rpc":
            Workers().ask(body["method"], **body["kwargs"])
        case "/init_weight_transfer_engine":
            check(StagingdInitInfo, **body["init_info"])
        case "/update_weights":
            check(StagingdUpdateInfo, **body["update_info"])
        case _:
            assert not body


def _doctor(_: Path, words: list[str]) -> None:
    """Its options are read. What it finds is the machine's affair; tests/test_doctor.py has machines for it."""
    known_command(words[1:])
    typer.main.get_command(app).commands["doctor"].make_context("doctor", words[2:])


CHECKS: dict[str, Check] = {
    "stagingd doctor": _doctor,
    "pip": _pip,
    "/opt/stagingd/bin/pip": _pip,
    "make": _make,
    "torchrun": _torchrun,
    "python examples/huggingface.py": _example,
    "vllm serve": _serve_vllm,
    "python -m stagingd_vllm.plan_command": _plan,
    "python -m stagingd_vllm.follow_command": _follow,
    "curl": _curl,
}
"""How commands are checked that are not run by bash, by how they begin."""
