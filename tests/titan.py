# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan for tests: a folder with a tokenizer and data of our own, and runs of real ranks in it, on CPU."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).parent
DEADLINE_S = 100.0
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]


def make_assets(folder: Path) -> None:
    """A tokenizer of bytes, and some lines of text, where TorchTitan looks for them."""
    tokenizer_folder, data_folder = folder / "tests/assets/tokenizer", folder / "tests/assets/c4_test"
    tokenizer_folder.mkdir(parents=True)
    data_folder.mkdir()
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(tokenizer_folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(config))
    lines = [json.dumps({"text": f"{number} bottles of weights on the wall, " * 20}) for number in range(100)]
    (data_folder / "data.json").write_text("\n".join(lines))


@dataclass
class Run:
    """A run that has been started, and what its witness saves."""

    process: subprocess.Popen[bytes]
    folder: Path
    ranks: int

    @property
    def log(self) -> str:
        """What the ranks wrote."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log.*")))

    def statuses(self) -> list[int]:
        """Wait for its end. Returns the exit statuses of its ranks."""
        assert self.process.stdout is not None
        watch = select.poll()
        watch.register(self.process.stdout, select.POLLIN)
        assert watch.poll(DEADLINE_S * 1000), f"the run does not end:\n{self.log}"
        return list(json.loads(self.process.stdout.readline()))

    def saved(self, step: int) -> bool:
        """Whether all ranks have saved what they have after a step."""
        return all((self.folder / f"{step}.{rank}").exists() for rank in range(self.ranks))

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The whole model after a step, by Hugging Face names."""
        found: dict[str, torch.Tensor] = {}
        for rank in range(self.ranks):
            found |= torch.load(self.folder / f"{step}.{rank}", weights_only=True)
        return found


@dataclass
class Titan:
    """A process that has imported TorchTitan, and forks a run's ranks when asked for one."""

    process: subprocess.Popen[bytes]
    folder: Path

    def start(self, name: str, ranks: int, *arguments: str, **environment: str) -> Run:
        """Start a run.

        Args:
            name: of a folder of its own, where its witness saves to.
            ranks: their number.
            arguments: TorchTitan's.
            environment: what the ranks have in theirs besides.
        """
        folder = self.folder / name
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WITNESS": str(folder)}
        run = {"ranks": ranks, "arguments": arguments, "log": str(folder / "log")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**run, "environment": {**rendezvous, **environment}}).encode() + b"\n")
        self.process.stdin.flush()
        return Run(self.process, folder, ranks)


@contextmanager
def running(folder: Path, *paths: str) -> Iterator[Titan]:
    """TorchTitan in a folder that it may fill.

    Args:
        folder: an empty one.
        paths: where to look for modules first, such as another TorchTitan than the one installed.
    """
    make_assets(folder)
    search = [*paths, str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(HERE / "titan_cpu.py")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=folder, start_new_session=True
    )
    try:
        yield Titan(process, folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # a test has failed, and its ranks are still at work
            process.wait(5)
        assert process.stdout is not None
        process.stdout.close()
