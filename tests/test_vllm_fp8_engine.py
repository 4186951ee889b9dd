# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine that quantizes to FP8, at tensor-parallel size 2: versions in place are its own loader's, in every
byte and scale."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import DEADLINE_S, eventually
from stagingd_vllm.answers import checked
from stagingd_vllm.outcomes import RefusedByAll
from stagingd_vllm.quantization_error import QuantizationError
from tiny_engines import local_engine, save_checkpoints

pytestmark = pytest.mark.vllm


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
