# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine on the CPU takes versions in place, as if it had loaded them from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stagingd_vllm.answers import checked
from stagingd_vllm.plan import PlanRefused
from tiny_engines import local_engine, save_checkpoints

from stagingd.errors import OutOfOrder

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 5, 9, 7], list(range(20, 60))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four checkpoints of one tiny model; the third has one tensor too many, and in the last head and embedding are
    equal."""
    paths = save_checkpoints(tmp_path_factory.mktemp("checkpoints"), 4, words=1021)  # vLLM pads it
    odd = paths[2] / "model.safetensors"
    save_file(load_file(odd) | {"model.layers.0.self_attn.bend.weight": torch.zeros(4)}, odd)
    tied = paths[3] / "model.safetensors"
    tensors = load_file(tied)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tied)
    return paths


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, checkpoints: list[Path]) -> Iterator[Any]:
    """An engine that runs the first checkpoint; detached from every stage."""
    with local_engine(
        tmp_path_factory.mktemp("plugins"), checkpoints[0], "checkpoint_extension.CheckpointExtension"
    ) as llm:
        yield llm


def attach(llm: Any, *checkpoints: Path) -> dict[str, object]:
    stage = os.pathsep.join(map(str, checkpoints))
    return checked(llm.collective_rpc("stagingd_attach", kwargs={"stage": stage}))[0]


def update(llm: Any, version: int) -> dict[str, object]:
    return checked(llm.collective_rpc("stagingd_update", kwargs={"version": version}))[0]


def generated(llm: Any) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Greedy tokens and the log-probabilities of the two likeliest tokens at every step, per prompt."""
    sampling = type(llm.get_default_sampling_params())(temperature=0, max_tokens=16, logprobs=2, detokenize=False)
    llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    return [
        (list(output.token_ids), [{token: p.logprob for token, p in step.items()} for step in output.logprobs])
        for output in outputs
    ]


def test_an_update_in_place_equals_vllms_own_reload_bit_for_bit(engine: Any, checkpoints: list[Path]) -> None:
    before, weights = generated(engine), engine.collective_rpc("stagingd_weights")
    summary = attach(engine, *checkpoints[:2])
    assert summary["bytes_per_update"] == summary["bytes_of_stage"]
    assert update(engine, 2)["version"] == 2
    updated, updated_weights = generated(engine), engine.collective_rpc("stagingd_weights")
    update(engine, 1)
    assert engine.collective_rpc("stagingd_weights") == weights
    assert generated(engine) == before
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[1])})
    assert generated(engine) == updated
    # Addresses too: neither way moves a parameter.
    assert engine.collective_rpc("stagingd_weights") == updated_weights
    assert updated != before
    engine.collective_rpc("stagingd_detach")


def test_a_plan_survives_vllms_own_reload(engine: Any, checkpoints: list[Path]) -> None:
    attach(engine, *checkpoints[:2])
    update(engine, 1)
    expected = generated(engine)
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[1])})
    update(engine, 1)
    assert generated(engine) == expected
    assert engine.collective_rpc("stagingd_version") == [1]
    engine.collective_rpc("stagingd_detach")


def test_weights_that_are_tied_in_the_trainer_reach_both_places_of_an_engine_that_keeps_them_apart(
    engine: Any, checkpoints: list[Path]
) -> None:
    summary = attach(engine, checkpoints[3])
    assert summary["bytes_per_update"] == summary["bytes_of_stage"] + 2 * 1021 * 256
    update(engine, 1)
    updated = engine.collective_rpc("stagingd_weights")
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[3])})
    assert engine.collective_rpc("stagingd_weights") == updated
    engine.collective_rpc("stagingd_detach")


def test_a_stage_that_does_not_fit_is_refused_and_the_engine_goes_on(engine: Any, checkpoints: list[Path]) -> None:
    expected = generated(engine)
    with pytest.raises(PlanRefused, match=r"loader refuses model\.layers\.0\.self_attn\.bend\.weight"):
        attach(engine, checkpoints[2])
    assert engine.collective_rpc("stagingd_version") == [None]
    assert generated(engine) == expected


def test_an_update_without_a_stage_is_refused(engine: Any) -> None:
    with pytest.raises(OutOfOrder, match="attached to no stage"):
        update(engine, 1)


def test_each_step_is_told_of_before_the_model_computes_it(engine: Any) -> None:
    """What prefetching on a GPU keeps to: the runner of this vLLM is one that is known."""
    engine.collective_rpc("stagingd_watch")
    (tokens, _), _ = generated(engine)
    (steps,) = engine.collective_rpc("stagingd_steps")
    assert len(tokens) <= steps <= len(tokens) + 2  # the runner may be a step or two ahead of the last token
