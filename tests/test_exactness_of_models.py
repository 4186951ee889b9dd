# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Live weights that a receiver has written are in every byte and scale what vLLM's own loading makes.

Per model, mode, and engine of one to four ranks; trainers hold tensors whole, in rows of three ranks, or in columns of
two, each in turn, or all of them by ``--all-cuts``. ``exactness_witness.py`` says what is real there.
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
ENGINES = {"TP 1": (1, False), "TP 2": (2, False), "TP 4": (4, False), "EP 2": (2, True)}


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
        return [self.mode] if self.mode else []


CASES = [case for model in MODELS for mode in MODES for engine in ENGINES if (case := Case(model, mode, engine)).exists]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    with witness("exactness_witness.py", tmp_path_factory.mktemp("models")) as made:
        yield made


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_every_byte_and_scale_is_that_of_vllms_own_loading(
    asked: Witness, exactness: dict[tuple[Row, str], Compared], pytestconfig: pytest.Config, number: int
) -> None:
    case = CASES[number]
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
