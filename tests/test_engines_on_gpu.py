# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on GPUs: after versions in place, and one that was prefetched beside them and swapped in, they are
engines that were started from the same weights.

``pytest -m gpu``; cases with two ranks exist where there are two GPUs. Small functions beside the model are not
compiled (``engine_environment``): compiled, vLLM's quantizer per block takes approximate reciprocals, and one byte in
millions is another (``test_schemes_on_gpu.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from daemons import RunningDaemon
from engine_environment import engine_environment
from safetensors.torch import save_file
from stagingd_client import Stage
from stagingd_vllm.answers import checked

from benchmarks.read_model import Sizes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

MODELS = {
    "dense": Sizes(2, 512, 1024, 8, 4, 64, 1024),
    "experts": Sizes(2, 512, 256, 8, 4, 64, 1024, experts=128),
}
MODES = (None, "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel_weight_only")
RANKS = [ranks for ranks in (1, 2) if ranks <= torch.cuda.device_count()]
CASES = [
    (model, mode, ranks, graphs)
    for model in MODELS
    for mode in MODES
    for ranks in RANKS
    for graphs in (False, True)
    if mode != "int8_per_channel_weight_only" or (model == "experts" and ranks == 1)  # 0.26: for experts, per rank
]
PROMPTS = ([1, 5, 9, 7], list(range(20, 90)))


@cache
def weights(sizes: Sizes, version: int) -> dict[str, torch.Tensor]:
    return dict(sizes.tensors(version, "cuda"))


def save_checkpoint(folder: Path, sizes: Sizes, version: int) -> Path:
    path = folder / f"version-{version}"
    sizes.save_config(path)
    save_file(weights(sizes, version), path / "model.safetensors", metadata={"format": "pt"})
    return path


@contextmanager
def engine(path: Path, mode: str | None, ranks: int, graphs: bool) -> Iterator[Any]:
    """An engine that was started from a checkpoint; one of one rank is in this process, which has imported vLLM."""
    vllm = pytest.importorskip("vllm")
    captured = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]}
    with pytest.MonkeyPatch.context() as environment, ExitStack() as cleanup:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        cleanup.callback(forget_engine, vllm)
        llm = vllm.LLM(
            str(path),
            skip_tokenizer_init=True,
            quantization=mode,
            tensor_parallel_size=ranks,
            distributed_executor_backend="uni" if ranks == 1 else "mp",
            max_model_len=256,
            max_num_seqs=2,
            gpu_memory_utilization=0.06,
            kv_cache_memory_bytes=2**28,
            worker_extension_cls="gpu_extension.GpuExtension",
            **({"compilation_config": captured} if graphs else {"enforce_eager": True}),
        )
        cleanup.callback(llm.llm_engine.engine_core.shutdown)
        yield llm


def forget_engine(vllm: Any) -> None:
    """What vLLM keeps of an engine for its whole process: its groups, and the pool of its graphs' memory."""
    vllm.distributed.cleanup_dist_env_and_memory()
    platform = vllm.platforms.current_platform
    type(platform)._global_graph_pool = None  # torch refuses a pool whose graphs are gone


def generated(llm: Any) -> list[list[dict[int, float]]]:
    """The likeliest tokens of every step, with their log-probabilities. The first step is prefill, others decode."""
    sampling = type(llm.get_default_sampling_params())(
        temperature=0, max_tokens=8, logprobs=5, ignore_eos=True, detokenize=False
    )
    llm.reset_prefix_cache()
    outputs = [
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0] for prompt in PROMPTS
    ]
    return [[{token: found.logprob for token, found in step.items()} for step in out.logprobs] for out in outputs]


def publish(stage: Stage, version: int, tensors: dict[str, torch.Tensor]) -> None:
    stage.begin(version)
    for name, tensor in tensors.items():
        stage.put(name, tensor)
    stage.commit().wait()


@pytest.mark.parametrize(("model", "mode", "ranks", "graphs"), CASES)
def test_an_updated_engine_is_one_that_was_started_from_the_same_weights(
    own_daemon: RunningDaemon, tmp_path: Path, model: str, mode: str | None, ranks: int, graphs: bool
) -> None:
    sizes = MODELS[model]
    first, other = (save_checkpoint(tmp_path, sizes, version) for version in (1, 2))
    first_weights, other_weights, passing = (weights(sizes, version) for version in (1, 2, 3))
    with (
        engine_environment(tmp_path / "plugins"),
        Stage.open("policy", rank=0, ranks=1, socket=own_daemon.socket) as stage,
    ):
        stage.declare(first_weights)
        with engine(first, mode, ranks, graphs) as llm:
            started, said = llm.collective_rpc("stagingd_weights"), generated(llm)
            publish(stage, 1, passing)
            arguments = {"stage": "policy", "socket": str(own_daemon.socket), "engine": "e", "prefetch_gib": 4.0}
            checked(llm.collective_rpc("stagingd_attach", kwargs=arguments))
            checked(llm.collective_rpc("stagingd_update"))
            assert generated(llm) != said
            publish(stage, 2, first_weights)
            places, still = llm.collective_rpc("stagingd_addresses"), generated(llm)
            checked(llm.collective_rpc("stagingd_prefetch", kwargs={"version": 2}))
            assert generated(llm) == still, "the live weights are read, and not written, meanwhile"
            checked(llm.collective_rpc("stagingd_swap", kwargs={"version": 2, "timeout_s": 60.0}))
            assert llm.collective_rpc("stagingd_weights") == started
            assert generated(llm) == said
            publish(stage, 3, other_weights)
            checked(llm.collective_rpc("stagingd_update"))
            assert llm.collective_rpc("stagingd_addresses") == places
            updated, says = llm.collective_rpc("stagingd_weights"), generated(llm)
            llm.collective_rpc("stagingd_detach")
        with engine(other, mode, ranks, graphs) as llm:
            assert llm.collective_rpc("stagingd_weights") == updated
            assert generated(llm) == says
