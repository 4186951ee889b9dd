# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Live weights that are copied from what trainers have quantized are those that vLLM's own loading makes.

What they quantize is what the plans of the engine's workers tell; ``exactness_witness.py`` says what is real.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from witness import Witness, witness

pytest.importorskip("vllm")

CASES = [
    ("qwen3", "fp8_per_tensor", 2, False),
    ("llama", "fp8_per_block", 1, False),
    ("qwen3-moe", "fp8_per_channel", 2, True),
    ("qwen3-moe", "fp8_per_block", 2, False),
    ("qwen3-moe, fused experts", "fp8_per_tensor", 2, False),
    ("mixtral", "int8_per_channel_weight_only", 2, False),
    ("deepseek-v3", "fp8_per_tensor", 2, True),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    with witness("exactness_witness.py", tmp_path_factory.mktemp("models")) as made:
        yield made


@pytest.mark.parametrize(("model", "mode", "ranks", "expert"), CASES)
def test_every_copied_byte_and_its_scale_is_that_of_vllms_own_loading(
    asked: Witness, model: str, mode: str, ranks: int, expert: bool
) -> None:
    case = {"model": model, "mode": mode, "ranks": ranks, "expert": expert, "cut": "rows of 3 ranks"}
    outcomes = asked.ask(case | {"quantized": True})
    assert isinstance(outcomes, list), outcomes
    assert [what for outcome in outcomes for what in outcome["wrong"]] == []
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert outcome["schemes"] == [mode]
        assert outcome["quantized otherwise"] == []
        assert outcome["copied"]
