# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Live weights that a receiver has written are in every byte and scale what vLLM's own loading makes.

Per model, mode, and engine of one to four ranks; trainers hold tensors whole, in rows of three ranks, or in columns of
two, each in turn, or all of them by ``--all-cuts``. ``exactness_witness.py`` says what is real there.

Modes are vLLM's online quantizations of a bfloat16 checkpoint, and kinds of checkpoints that are FP8 already: those by
their name in ``fp8_checkpoints.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from exactness_table import Compared, Row
from tiny_models import MODELS
from witness import Witness, witness

pytest.importorskip("vllm")

CUTS = ("whole", "rows of 3 ranks", "columns of 2 ranks")
MODES = (None, "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel_weight_only")
TORCHAO = ("torchao_per_row", "torchao_per_tensor")
ENGINES = {"TP 1": (1, False), "TP 2": (2, False), "TP 4": (4, False), "EP 2": (2, True)}


OF_CHECKPOINTS = {
    "compressed-tensors per channel": "fp8_per_channel",
    "compressed-tensors per tensor": "fp8_per_tensor",
    "compressed-tensors in blocks": "fp8_per_block",
    "fp8 per tensor": "fp8_per_tensor",
    "fp8 in blocks": "fp8_per_block",
}
"""Kinds of checkpoints, and what the engine's weights are quantized by when it has loaded one."""


@dataclass(frozen=True)
class Case:
    """A row and a column of the table."""

    model: str
    mode: str | None
    engine: str

    def __str__(self) -> str:
        return f"{self.model}-{self.mode}-{self.engine}"

    @property
    def exists(self) -> bool:
        """The engine has INT8 for experts alone, and expert parallelism for models with experts."""
        sparse = MODELS[self.model].sparse
        return sparse or not (self.engine == "EP 2" or self.mode == "int8_per_channel_weight_only")

    @property
    def schemes(self) -> list[str]:
        """What its weights are quantized by."""
        return [OF_CHECKPOINTS.get(self.mode, self.mode)] if self.mode else []


CASES = [case for model in MODELS for mode in MODES for engine in ENGINES if (case := Case(model, mode, engine)).exists]
CASES += [
    Case("llama", "compressed-tensors per channel", "TP 1"),
    Case("llama", "compressed-tensors per channel", "TP 4"),
    Case("qwen3-moe", "compressed-tensors per channel", "TP 2"),
    Case("qwen3-moe", "compressed-tensors per channel", "EP 2"),
    Case("deepseek-v3", "compressed-tensors per channel", "TP 2"),
    Case("llama", "compressed-tensors per tensor", "TP 2"),
    Case("llama, in blocks", "compressed-tensors in blocks", "TP 1"),
    Case("qwen3-moe, in blocks", "compressed-tensors in blocks", "TP 2"),
    Case("llama", "fp8 per tensor", "TP 1"),
    Case("mixtral", "fp8 per tensor", "TP 2"),
    Case("deepseek-v3", "fp8 per tensor", "TP 2"),
    Case("llama, in blocks", "fp8 in blocks", "TP 1"),
    Case("llama, in blocks", "fp8 in blocks", "TP 2"),
    Case("qwen3-moe, in blocks", "fp8 in blocks", "TP 2"),
    Case("qwen3-moe, in blocks", "fp8 in blocks", "EP 2"),
    Case("deepseek-v3, in blocks", "fp8 in blocks", "TP 2"),
    *(
        Case(model, mode, engine)
        for model in ("llama", "deepseek-v3")
        for mode in TORCHAO
        for engine in ("TP 1", "TP 2")
    ),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    with witness("exactness_witness.py", tmp_path_factory.mktemp("models")) as made:
        yield made


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_every_byte_and_scale_is_that_of_vllms_own_loading(
    asked: Witness, exactness: dict[tuple[Row, str], Compared], pytestconfig: pytest.Config, number: int
) -> None:
    case = CASES[number]
    if case.mode in TORCHAO:
        pytest.importorskip("torchao")
    ranks, expert = ENGINES[case.engine]
    cuts = CUTS if pytestconfig.getoption("all_cuts") else (CUTS[number % len(CUTS)],)
    for cut in cuts:
        question = {"model": case.model, "mode": case.mode, "ranks": ranks, "expert": expert, "cut": cut}
        outcomes = asked.ask(question)
        assert isinstance(outcomes, list), outcomes
        wrong = [what for outcome in outcomes for what in outcome["wrong"]]
        sums = [sum(outcome[what] for outcome in outcomes) for what in ("bytes", "scales")]
        exactness[Row(case.model, case.mode or "bfloat16"), case.engine] = Compared(*sums, len(wrong))
        assert wrong == [], cut
        assert len(outcomes) == ranks
        assert all(outcome["schemes"] == case.schemes for outcome in outcomes)


def test_what_merging_of_scales_rounds_twice_is_off_by_one_step_and_only_in_fused_weights(asked: Witness) -> None:
    """A checkpoint has a scale per tensor for each of q, k and v; vLLM quantizes them once more, with the greatest."""
    mode = "fp8 per tensor, scales of their own"
    for model in ("llama", "qwen3-moe"):
        question = {"model": model, "mode": mode, "ranks": 2, "expert": False, "cut": "whole"}
        outcomes = asked.ask(question)
        for outcome in outcomes:
            assert outcome["wrong"]
            assert all(what.endswith(" bytes") for what in outcome["wrong"]), "scales are those of the fused weight"
            assert all("qkv_proj" in what or "gate_up" in what or "w13" in what for what in outcome["wrong"])
            assert outcome["steps"] == 1


QUANTIZED_CASES = [
    ("qwen3", "fp8_per_tensor", 2, False),
    ("llama", "fp8_per_block", 1, False),
    ("qwen3-moe", "fp8_per_channel", 2, True),
    ("qwen3-moe", "fp8_per_block", 2, False),
    ("qwen3-moe, fused experts", "fp8_per_tensor", 2, False),
    ("mixtral", "int8_per_channel_weight_only", 2, False),
    ("deepseek-v3", "fp8_per_tensor", 2, True),
]


@pytest.mark.parametrize(("model", "mode", "ranks", "expert"), QUANTIZED_CASES)
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
