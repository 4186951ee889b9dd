# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A process that has imported vLLM, and answers case after case: a line of JSON each way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    surroundings = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=surroundings
        )
    try:
        yield Witness(process, log)
    finally:
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, log.read_text()[-4000:]
