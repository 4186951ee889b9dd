# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A process that has imported vLLM, and answers case after case: a line of JSON each way. Both ends of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_environment import ON_ANY_CPU

from stagingd.errors import StagingError

DEADLINE_S = 60.0


@dataclass
class Witness:
    """One that runs."""

    process: subprocess.Popen[str]
    log: Path

    def ask(self, case: Mapping[str, Any]) -> Any:
        """What it finds about a case."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(case), file=self.process.stdin)
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("outcome "):
                return json.loads(line.removeprefix("outcome "))
        raise AssertionError(self.log.read_text()[-4000:])


@contextmanager
def witness(script: str, folder: Path) -> Iterator[Witness]:
    """Start a script of this folder; at the end it has to end well."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    log = folder / "log"
    surroundings = {**os.environ, **ON_ANY_CPU}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=surroundings
        )
    try:
        yield Witness(process, log)
    finally:
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, log.read_text()[-4000:]


def serve(examine: Callable[[dict[str, Any]], Any], refusal: type[StagingError] = StagingError) -> None:
    """The loop of such a process. What is refused is an answer too."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            outcome = examine(json.loads(line))
        except refusal as refused:
            outcome = {"refused": str(refused)}
        print("outcome", json.dumps(outcome), flush=True)
