# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the blocks of one page, one after the other, in a folder and with a daemon of its own.

Python runs here, in one namespace per page, which at first holds what the pages take for granted: a model, its
optimizer, a function that trains. Shell commands run in bash, but those of ``read_commands.py``.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import torch
import yaml
from daemons import DEADLINE_S, eventually
from documents import ROOT, Block
from read_commands import checker, marked, torchtitan, words_of
from signed import instead_of_vllm
from stagingd_client import Stage

from stagingd.segment import SHARED_MEMORY


class CannotRun(AssertionError):
    """A block of a kind that nobody here knows how to run, and that is not marked with a reason."""


class Snippets:
    """A page's folder, daemon and namespace."""

    def __init__(self, folder: Path, prefix: str, namespace: dict[str, Any]) -> None:
        self.folder = folder
        self.prefix = prefix
        self.namespace = namespace
        self._served: dict[Path, subprocess.Popen[bytes]] = {}

    @property
    def runtime(self) -> Path:
        """The usual runtime directory."""
        return self.folder / "run"

    def run(self, block: Block) -> None:
        """Run a block, or check it. Raises whatever is wrong with it."""
        if block.file_name is not None:
            (self.folder / block.file_name).write_text(block.text)
        match block.language:
            case "python":
                self._run_python(block)
            case "sh":
                self._run_shell(block)
            case "toml":
                self._check_toml(block)
            case "json":
                json.loads(block.text)
            case "yaml":
                list(yaml.safe_load_all(block.text))
            case "ini":
                self._check_unit(block)
            case "text":
                said = [
                    line for line in block.text.splitlines() if re.match(r"\s*(\$ |stagingd |python |pip |make )", line)
                ]
                assert not said, f"a command in a block of text: {said}"
            case "{eval-rst}" | "{toctree}":
                pass  # the documentation's own build reads them
            case other:
                raise CannotRun(f"a block of {other or 'no language'}; give it one that is known")

    # Python

    def _run_python(self, block: Block) -> None:
        self.need_daemon()
        code = compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        engine = re.search(r"\bvllm\b|\bllm\b", block.text) is not None
        with instead_of_vllm() if engine else contextlib.nullcontext():
            if code.co_flags & inspect.CO_COROUTINE:
                asyncio.run(types.FunctionType(code, self.namespace)())
            else:
                exec(code, self.namespace)

    # Shell

    def _run_shell(self, block: Block) -> None:
        commands = block.commands
        if all(checker(command) is None and marked(command) is None for command in commands):
            self._run_in_bash(block)
            return
        for command in commands:
            check = checker(command)
            if check is not None:
                check(self.folder, words_of(command))
            elif marked(command) is None:
                self.need_daemon()
                self._bash(command)

    def _run_in_bash(self, block: Block) -> None:
        """Commands as they stand. A daemon in the foreground stays until the page's end."""
        *before, last = block.commands
        if not last.startswith("stagingd serve"):
            self.need_daemon()
            self._bash(block.text)
            return
        runtime = self._runtime_of(last)
        if before:
            self._hand_over("\n".join(before), last, runtime)
        else:
            self._stop(runtime)
            self._serve(last, runtime)

    def _hand_over(self, ending: str, beginning: str, runtime: Path) -> None:
        """Commands that end a daemon for another to take its place: that finds every stage."""
        self.need_daemon()
        with Stage.open("kept") as stage:
            stage.declare({"w": torch.zeros(4)})
        before = self._segments()
        self._bash(ending)
        assert self._served.pop(runtime).wait(DEADLINE_S) == 0
        self._serve(beginning, runtime)
        assert self._segments() == before

    def _segments(self) -> list[str]:
        return sorted(path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(self.prefix.lstrip("/")))

    def _bash(self, text: str) -> None:
        done = subprocess.run(
            # Bash would give way to a command that is alone, and stagingd looks by which shell it was started.
            ["bash", "-euo", "pipefail", "-c", f"{text}\n:"],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"

    def environment(self) -> dict[str, str]:
        """What a reader's shell has, in a home of its own; memory is not locked, as the limit may be low."""
        binaries = Path(sys.prefix) / "bin"
        return {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "USER": self.prefix.strip("/-"),
            "STAGINGD_RUNTIME_DIR": str(self.runtime),
            "STAGINGD_SEGMENT_PREFIX": self.prefix,
            "STAGINGD_LOCK_MEMORY": "false",
        }

    # Daemons

    def _runtime_of(self, command: str) -> Path:
        said = shlex.split(os.path.expandvars(command.replace("$HOME", str(self.folder))))
        return Path(said[said.index("--runtime-dir") + 1]) if "--runtime-dir" in said else self.runtime

    def need_daemon(self) -> None:
        """Have one that serves the usual runtime directory."""
        if self.runtime not in self._served:
            self._serve("stagingd serve", self.runtime)

    def _serve(self, command: str, runtime: Path) -> None:
        process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment())
        self._served[runtime] = process
        lock, socket = runtime / "lock", runtime / "control.sock"

        def serves() -> bool:
            assert process.poll() is None, f"{command} ended"
            return socket.exists() and lock.read_text() == str(process.pid)

        eventually(serves, f"{command} to serve")

    def _stop(self, runtime: Path) -> None:
        process = self._served.pop(runtime, None)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0

    def close(self) -> None:
        """End the daemons; they leave nothing."""
        for runtime in [*self._served]:
            self._stop(runtime)
        assert not self._segments()

    # What is read

    def _check_toml(self, block: Block) -> None:
        """What has a model is a config of TorchTitan's."""
        if "model" in tomllib.loads(block.text):
            assert block.file_name is not None, "say in a comment in the first line how the file is called"
            torchtitan(self.folder, ["--job.config_file", block.file_name])

    def _check_unit(self, block: Block) -> None:
        """A drop-in: systemd takes it with the unit that it is for."""
        unit = self.folder / "stagingd@.service"
        text = (ROOT / "systemd" / unit.name).read_text()
        unit.write_text(text.replace("/usr/bin/stagingd", str(Path(sys.prefix) / "bin" / "stagingd")) + block.text)
        command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        complaints = [line for line in checked.stderr.splitlines() if "stagingd" in line]
        assert (checked.returncode, complaints) == (0, [])
