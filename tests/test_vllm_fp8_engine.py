# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine that quantizes to FP8, at tensor-parallel size 2: versions in place are its own loader's, in every
byte and scale."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from daemons import DEADLINE_S, RunningDaemon, eventually
from private_stage import by_rows
from safetensors.torch import load_file
from stagingd_client import LocalShard, Stage
from stagingd_vllm.answers import checked
from stagingd_vllm.outcomes import RefusedByAll
from stagingd_vllm.quantization_error import QuantizationError
from test_stage import in_parallel
from tiny_engines import local_engine, save_checkpoints

pytestmark = pytest.mark.vllm

PLANNED_S = 120.0
"""The longest that the plan command may take, in seconds: it imports vLLM."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"), 2, width=384)  # kernels take multiples of 16


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, checkpoints: list[Path]) -> Iterator[Any]:
    """An engine that runs the first checkpoint."""
    options = {"tensor_parallel_size": 2, "quantization": "fp8_per_tensor"}
    with local_engine(
        tmp_path_factory.mktemp("plugins"), checkpoints[0], "fp8_extension.Fp8Extension", **options
    ) as llm:
        yield llm


def generated(llm: Any, prompt: list[int]) -> list[tuple[int, float]]:
    """Greedy tokens with their log-probabilities. One prompt at a time: activations share a scale with their batch."""
    sampling = type(llm.get_default_sampling_params())(temperature=0, max_tokens=8, logprobs=1, detokenize=False)
    llm.reset_prefix_cache()
    output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
    return [(token, step[token].logprob) for token, step in zip(output.token_ids, output.logprobs, strict=True)]


def test_fp8_in_place_equals_vllms_own_loading_bit_for_bit_on_both_ranks(engine: Any, checkpoints: list[Path]) -> None:
    prompt = [1, 5, 9, 7, *range(20, 60)]
    kernels = engine.collective_rpc("stagingd_kernels")[0]
    assert {"Fp8PerTensorOnlineLinearMethod", "PerTensorTorchFP8ScaledMMLinearKernel"} <= set(kernels)
    loaded, before = engine.collective_rpc("stagingd_weights"), generated(engine, prompt)
    stage = os.pathsep.join(map(str, checkpoints))
    summaries = checked(engine.collective_rpc("stagingd_attach", kwargs={"stage": stage}))
    assert all(summary["bytes_per_update"] < 0.51 * summary["bytes_of_stage"] for summary in summaries)

    checked(engine.collective_rpc("stagingd_update", kwargs={"version": 2}))
    updated, after = engine.collective_rpc("stagingd_weights"), generated(engine, prompt)
    assert after != before
    checked(engine.collective_rpc("stagingd_update", kwargs={"version": 1}))
    assert engine.collective_rpc("stagingd_weights") == loaded  # as they were loaded, and where they were
    assert generated(engine, prompt) == before
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[1])})
    assert engine.collective_rpc("stagingd_weights") == updated
    assert generated(engine, prompt) == after
    engine.collective_rpc("stagingd_detach")


def prefetched(engine: Any) -> bool:
    return {answer["version"] for answer in checked(engine.collective_rpc("stagingd_prefetched"))} == {2}


def test_what_is_prefetched_goes_live_on_both_ranks_or_on_none(engine: Any, checkpoints: list[Path]) -> None:
    kwargs = {"stage": os.pathsep.join(map(str, checkpoints)), "prefetch_gib": 1.0}
    summaries = checked(engine.collective_rpc("stagingd_attach", kwargs=kwargs))
    assert [summary["mode"] for summary in summaries] == ["prefetch", "prefetch"]
    checked(engine.collective_rpc("stagingd_update", kwargs={"version": 2}))
    second = engine.collective_rpc("stagingd_weights")
    checked(engine.collective_rpc("stagingd_update", kwargs={"version": 1}))
    first = engine.collective_rpc("stagingd_weights")

    checked(engine.collective_rpc("stagingd_prefetch", kwargs={"version": 2}))
    eventually(lambda: prefetched(engine), "both ranks to have read version 2")
    assert engine.collective_rpc("stagingd_weights") == first
    for version, rank in ((3, 2), (2, 1)):
        engine.collective_rpc("stagingd_forget", kwargs={"rank": rank})
        with pytest.raises(RefusedByAll, match=f"version {version} is to be swapped in, and (2|none) has been"):
            checked(engine.collective_rpc("stagingd_swap", kwargs={"version": version}))
        assert engine.collective_rpc("stagingd_weights") == first

    checked(engine.collective_rpc("stagingd_prefetch", kwargs={"version": 2}))
    swapped = checked(engine.collective_rpc("stagingd_swap", kwargs={"version": 2, "timeout_s": DEADLINE_S}))
    assert [answer["version"] for answer in swapped] == engine.collective_rpc("stagingd_version") == [2, 2]
    assert engine.collective_rpc("stagingd_weights") == second
    engine.collective_rpc("stagingd_detach")


@contextmanager
def trainers(daemon: RunningDaemon, quantization: Path, tensors: dict[str, torch.Tensor]) -> Iterator[Any]:
    """Two ranks with some rows of each tensor; what is yielded has them publish a version."""
    cut = {name: by_rows(tuple(tensor.shape), 2) for name, tensor in tensors.items()}

    def held(rank: int, values: dict[str, torch.Tensor]) -> dict[str, LocalShard]:
        return {
            name: LocalShard(values[name][boxes[rank].slices], tuple(values[name].shape), boxes[rank].offsets)
            for name, boxes in cut.items()
        }

    with ExitStack() as opened:
        stages = [
            opened.enter_context(
                Stage.open("quantized", rank=rank, ranks=2, socket=daemon.socket, quantization=quantization)
            )
            for rank in range(2)
        ]
        raised = in_parallel(*(lambda stage=stage: stage.declare(held(stage.rank, tensors)) for stage in stages))
        assert raised == [None, None]

        def publish(version: int, values: dict[str, torch.Tensor]) -> None:
            for stage in stages:
                stage.begin(version)
                for name, shard in held(stage.rank, values).items():
                    stage.put(name, shard)
            for publication in [stage.commit() for stage in stages]:
                publication.wait()

        yield publish


def test_what_trainers_have_quantized_is_what_the_engine_would_have_made(
    engine: Any, checkpoints: list[Path], own_daemon: RunningDaemon, tmp_path: Path
) -> None:
    file = tmp_path / "quantization.json"
    options = (
        "--tensor-parallel=2",
        "--quantization=fp8_per_tensor",
        "--engine-device=cpu",
        f"--quantization-file={file}",
    )
    subprocess.run(
        [sys.executable, "-m", "stagingd_vllm.plan_command", str(checkpoints[0]), *options],
        check=True,
        timeout=DEADLINE_S,
    )
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[1])})
    second = engine.collective_rpc("stagingd_weights")
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[0])})
    first = engine.collective_rpc("stagingd_weights")
    versions = [load_file(path / "model.safetensors") for path in checkpoints]
    with trainers(own_daemon, file, versions[0]) as publish:
        kwargs = {"stage": "quantized", "socket": str(own_daemon.socket), "prefetch_gib": 1.0}
        summaries = checked(engine.collective_rpc("stagingd_attach", kwargs=kwargs))
        publish(1, versions[1])
        checked(engine.collective_rpc("stagingd_update"))
        assert engine.collective_rpc("stagingd_weights") == second
        publish(2, versions[0])
        checked(engine.collective_rpc("stagingd_prefetch", kwargs={"version": 2}))
        checked(engine.collective_rpc("stagingd_swap", kwargs={"version": 2, "timeout_s": DEADLINE_S}))
        assert engine.collective_rpc("stagingd_weights") == first
        bf16 = sum(tensor.nbytes for tensor in versions[0].values())
        assert summaries[0]["bytes_of_stage"] < 0.75 * bf16, "embeddings and head are held as they are"
        engine.collective_rpc("stagingd_detach")


def test_both_ranks_tell_what_clipping_does_to_the_error(engine: Any, checkpoints: list[Path]) -> None:
    kwargs = {"stage": os.pathsep.join(map(str, checkpoints)), "scale_rule": "sigma:3"}
    checked(engine.collective_rpc("stagingd_attach", kwargs=kwargs))
    checked(engine.collective_rpc("stagingd_update", kwargs={"version": 2}))
    weights = engine.collective_rpc("stagingd_weights")
    answers = checked(engine.collective_rpc("stagingd_quantization_error"))
    assert engine.collective_rpc("stagingd_weights") == weights
    assert [(answer["version"], answer["rank"], answer["scale_rule"]) for answer in answers] == [
        (2, 0, "sigma:3"),
        (2, 1, "sigma:3"),
    ]
    assert len(answers[0]["parameters"]) == 8  # fused, of two layers
    whole = {
        rule: sum((QuantizationError.of(answer["total"][rule]) for answer in answers), QuantizationError())
        for rule in ("sigma:3", "amax")
    }
    per_layer = 256 * (2 * 256 + 2 * 64) + 3 * 256 * 384
    assert [error.values for error in whole.values()] == [2 * per_layer] * 2
    assert whole["sigma:3"].clipped > whole["amax"].clipped == 0
    assert 0.02 < whole["amax"].relative_rms_error < 0.03
    assert whole["sigma:3"].greatest_error > whole["amax"].greatest_error
    engine.collective_rpc("stagingd_detach")
