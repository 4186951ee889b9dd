# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight-transfer API with the backend "stagingd": real engines on the CPU, daemon and trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import DEADLINE_S, RunningDaemon
from stagingd_vllm.answers import checked
from tiny_engines import BACKEND, OPTIONS, Trainer

pytestmark = pytest.mark.vllm
pytest_plugins = ["tiny_engines"]

PROMPTS = [[1, 5, 9, 7], list(range(20, 120))]
Generated = list[tuple[list[int], list[dict[int, float]]]]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    """An engine of two workers, with the backend and the extension."""
    vllm = pytest.importorskip("vllm")
    model = str(folder / "version-1")
    llm = vllm.LLM(model, tensor_parallel_size=2, weight_transfer_config=BACKEND, **OPTIONS)
    yield llm
    llm.llm_engine.engine_core.shutdown(timeout=DEADLINE_S)  # killed workers leave their shared memory behind


def generated(llm: Any, *, reset: bool = True) -> tuple[Generated, list[int]]:
    """Greedy tokens and the log-probabilities of the two likeliest ones; and the cached tokens of every prompt."""
    sampling = type(llm.get_default_sampling_params())(temperature=0, max_tokens=16, logprobs=2, detokenize=False)
    if reset:
        assert llm.reset_prefix_cache()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    said = [
        (list(o.token_ids), [{token: p.logprob for token, p in step.items()} for step in o.logprobs])
        for o in (output.outputs[0] for output in outputs)
    ]
    return said, [output.num_cached_tokens for output in outputs]


def reloaded(llm: Any, checkpoint: Path) -> Generated:
    """What the engine generates from weights that vLLM's own loader has loaded."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint)})
    return generated(llm)[0]


def init(llm: Any, daemon: RunningDaemon, **info: Any) -> None:
    llm.init_weight_transfer_engine({"init_info": {"stage": "policy", "socket": str(daemon.socket), **info}})


def update(llm: Any, **info: Any) -> None:
    llm.start_weight_update()
    llm.update_weights({"update_info": info})
    llm.finish_weight_update()


def test_an_update_equals_vllms_own_reload_bit_for_bit(engine: Any, daemon: RunningDaemon, trainer: Trainer) -> None:
    expected = [reloaded(engine, checkpoint) for checkpoint in trainer.checkpoints]
    init(engine, daemon)
    update(engine)
    assert generated(engine)[0] == expected[0]
    trainer.publish(2, 2)
    update(engine, newer_than=1, timeout_s=20.0)
    assert generated(engine)[0] == expected[1]
    assert expected[0] != expected[1]


def test_one_worker_that_fails_is_heard_once_and_the_engine_goes_on(
    engine: Any, daemon: RunningDaemon, trainer: Trainer
) -> None:
    for rank in (0, 1):
        init(engine, daemon)
        engine.collective_rpc("stagingd_break", args=(rank,))
        engine.start_weight_update()
        with pytest.raises(Exception, match="out_of_order: this engine is attached to no stage"):
            engine.update_weights({"update_info": {}})
        # No answer of the failed call is left for this one.
        assert engine.collective_rpc("stagingd_echo", args=(rank + 7,)) == [[0, rank + 7], [1, rank + 7]]
        # The session is over in both workers.
        init(engine, daemon)
        update(engine)
        assert engine.collective_rpc("stagingd_echo", args=(9,)) == [[0, 9], [1, 9]]


def test_calls_that_are_refused_leave_no_answer_behind(engine: Any, daemon: RunningDaemon, trainer: Trainer) -> None:
    init(engine, daemon)
    with pytest.raises(Exception, match="start_weight_update must be called before"):
        engine.update_weights({"update_info": {}})
    with pytest.raises(Exception, match="does not support draft model weight updates"):
        engine.start_draft_weight_update()
    engine.start_weight_update()
    with pytest.raises(Exception, match="already active"):
        engine.start_weight_update()
    with pytest.raises(Exception, match="unexpected keyword argument 'names'"):
        engine.update_weights({"update_info": {"names": []}})
    with pytest.raises(Exception, match="finish_weight_update called without"):
        engine.finish_weight_update()
    with pytest.raises(
        Exception, match=r"init_info .*Give the fields stage, socket, engine, scale_rule, prefetch_gib, timeout_s"
    ):
        engine.init_weight_transfer_engine({"init_info": {}})
    with pytest.raises(Exception, match="deadline_exceeded"):
        init(engine, daemon, stage="nobodys", timeout_s=0.2)
    assert engine.collective_rpc("stagingd_echo", args=(5,)) == [[0, 5], [1, 5]]


def test_a_version_that_does_not_come_is_refused_and_the_next_one_is_taken(
    engine: Any, daemon: RunningDaemon, trainer: Trainer
) -> None:
    expected = reloaded(engine, trainer.checkpoints[2])
    init(engine, daemon)
    engine.start_weight_update()
    with pytest.raises(Exception, match="deadline_exceeded"):
        engine.update_weights({"update_info": {"newer_than": 9, "timeout_s": 0.2}})
    trainer.publish(10, 3)
    update(engine, newer_than=9, timeout_s=20.0)
    assert generated(engine)[0] == expected


def test_cached_keys_of_the_weights_before_are_gone_after_a_reset_and_only_then(
    engine: Any, daemon: RunningDaemon, trainer: Trainer
) -> None:
    expected = reloaded(engine, trainer.checkpoints[0])
    reloaded(engine, trainer.checkpoints[1])
    init(engine, daemon)
    trainer.publish(11, 1)
    update(engine)
    stale, cached = generated(engine, reset=False)
    assert cached == [0, 96]
    assert stale != expected
    said, cached = generated(engine)
    assert cached == [0, 0]
    assert said == expected


def test_weights_that_vllm_reloaded_are_no_longer_of_the_version(
    engine: Any, daemon: RunningDaemon, trainer: Trainer
) -> None:
    kwargs = {"stage": "policy", "socket": str(daemon.socket), "engine": "another"}
    checked(engine.collective_rpc("stagingd_attach", kwargs=kwargs))
    trainer.publish(12, 2)
    trainer.publish(13, 3)
    updated = checked(engine.collective_rpc("stagingd_update"))
    assert [answer["version"] for answer in updated] == [13, 13]
    assert engine.collective_rpc("stagingd_version") == [13, 13]
    reloaded(engine, trainer.checkpoints[1])
    assert engine.collective_rpc("stagingd_version") == [None, None]
    reloaded(engine, trainer.checkpoints[2])  # of which the version was made
    assert engine.collective_rpc("stagingd_version") == [13, 13]
    engine.collective_rpc("stagingd_detach")
