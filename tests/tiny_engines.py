# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What tests of whole engines share: tiny checkpoints, their trainer, the plugin as if installed, and an extension.

Its fixtures are there for a test module that says ``pytest_plugins = ["tiny_engines"]``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from daemons import DEADLINE_S, RunningDaemon
from engine_environment import engine_environment
from safetensors.torch import load_file
from stagingd_client import Stage
from stagingd_vllm.extension import StagingdWorkerExtension

BACKEND = {"backend": "stagingd"}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,
    "gpu_memory_utilization": 0.2,
    "worker_extension_cls": "tiny_engines.TellingExtension",
}


def save_checkpoints(folder: Path, number: int, width: int = 344, words: int = 1024) -> list[Path]:
    """Checkpoints of one tiny model, as versions 1, 2, … of it would be.

    ``width`` is that of its inner layer, ``words`` how many its vocabulary has.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        hidden_size=256,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=words,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return _save(transformers.Qwen3ForCausalLM, config, folder, number)


def save_latent_checkpoints(folder: Path, number: int) -> list[Path]:
    """The same of a tiny DeepSeek-V3 without experts: vLLM's CPU engine packs those in an order of its own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        hidden_size=256,
        intermediate_size=384,  # FP8 kernels take multiples of 16
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=64,
        kv_lora_rank=512,  # with 64 rotated ones: the only size that the CPU kernel takes
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        vocab_size=1024,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return _save(transformers.DeepseekV3ForCausalLM, config, folder, number)


def _save(architecture: Any, config: Any, folder: Path, number: int) -> list[Path]:
    paths = [folder / f"version-{version}" for version in range(1, number + 1)]
    for path in paths:
        torch.manual_seed(int(path.name[-1]))
        model = architecture(config).to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(path)
    return paths


class Trainer:
    """The one rank of a stage that publishes checkpoints; version 1 stands when it is made."""

    def __init__(self, stage: Stage, checkpoints: list[Path]) -> None:
        self.stage = stage
        self.checkpoints = checkpoints
        stage.declare(load_file(checkpoints[0] / "model.safetensors"))
        self.publish(1, 1)

    def begin(self, version: int, checkpoint: int) -> None:
        """Begin a version and put all of it."""
        self.stage.begin(version)
        for name, tensor in load_file(self.checkpoints[checkpoint - 1] / "model.safetensors").items():
            self.stage.put(name, tensor)

    def publish(self, version: int, checkpoint: int) -> None:
        """All of it, until it is sealed."""
        self.begin(version, checkpoint)
        self.stage.commit().wait()


class Driven:
    """An AsyncLLM with an event loop of its own, which runs while a test asks for something."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.llm = self.do(self._start(model, OPTIONS | options))

    @staticmethod
    async def _start(model: Path, options: dict[str, Any]) -> Any:
        # Not at the top: workers import this module too, before vLLM has chosen how they are started.
        from vllm import AsyncEngineArgs  # noqa: PLC0415
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        return AsyncLLM.from_engine_args(AsyncEngineArgs(str(model), disable_log_stats=True, **options))

    def do(self, what: Coroutine[Any, Any, Any]) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(4 * DEADLINE_S):
                return await what

        return self.runner.run(limited())

    def close(self) -> None:
        self.llm.shutdown()
        self.runner.close()


class TellingExtension(StagingdWorkerExtension):
    """The extension that users name, with what tests want to know and to break."""

    def stagingd_echo(self: Any, number: int) -> list[int]:
        return [self.rank, number]

    def stagingd_pid(self: Any) -> int:
        return os.getpid()

    def stagingd_break(self: Any, rank: int) -> None:
        """Takes the stage away from one worker's weight-transfer engine."""
        if self.rank == rank:
            self.weight_transfer_engine.shutdown()


@contextmanager
def local_engine(folder: Path, model: Path, extension: str, **options: Any) -> Iterator[Any]:
    """An LLM whose workers are processes of their own. Its core is in this one, which has imported vLLM already."""
    vllm = pytest.importorskip("vllm")
    with engine_environment(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options |= {"worker_extension_cls": extension, "distributed_executor_backend": "mp"}
        llm = vllm.LLM(str(model), **(OPTIONS | options))
        yield llm
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three checkpoints, ``version-1`` and so on, and an environment for engines that run them."""
    folder = tmp_path_factory.mktemp("engines")
    save_checkpoints(folder, 3)
    with engine_environment(folder):
        yield folder


@pytest.fixture(scope="module")
def trainer(daemon: RunningDaemon, folder: Path) -> Iterator[Trainer]:
    """The stage "policy" on the module's daemon; its version 1 is the first checkpoint."""
    with Stage.open("policy", rank=0, ranks=1, socket=daemon.socket) as stage:
        yield Trainer(stage, sorted(folder.glob("version-*")))
