# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The formats in which a stage can hold weights that trainers have quantized already.

A tensor of such a stage is held in the format's dtype, and its moments are those of the values that were quantized. Its
scales follow from the moments, on both sides by the same arithmetic.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import FailFast, Field, ValidationError

from stagingd.errors import StagingError
from stagingd.moments import Grid
from stagingd.record import Name, Record

QUANTIZED_FROM: Final = frozenset({"bfloat16", "float16"})
"""The dtypes whose values are quantized."""


EngineDevice = Literal["cuda", "cpu"]
"""A kind of device that engines make their scales on."""


class QuantizationUnreadable(StagingError):
    """A file does not say what trainers quantize."""

    code = "quantization_unreadable"


class StageFormat(StrEnum):
    """What trainers make of the weights that engines would quantize: vLLM's names of the same."""

    FP8_PER_TENSOR = "fp8_per_tensor"
    FP8_PER_CHANNEL = "fp8_per_channel"
    FP8_PER_BLOCK = "fp8_per_block"
    INT8_PER_CHANNEL = "int8_per_channel_weight_only"

    @property
    def dtype(self) -> str:
        """Of the quantized elements."""
        return "int8" if self is StageFormat.INT8_PER_CHANNEL else "float8_e4m3fn"

    @property
    def grid(self) -> Grid:
        """The cells that share a scale."""
        if self is StageFormat.FP8_PER_TENSOR:
            return Grid.TENSOR
        return Grid.BLOCK if self is StageFormat.FP8_PER_BLOCK else Grid.ROW


class Quantization(Record):
    """How trainers quantize, and what.

    Attributes:
        format: the format.
        device: on which kind of device the engines make their own scales: their arithmetic differs per block.
        groups: names of the tensors that are quantized; those of one group are fused by the engines, and share their
            scale where a scale is a whole tensor's.
    """

    format: Annotated[StageFormat, Field(strict=False)]
    device: EngineDevice = "cuda"
    groups: Annotated[
        tuple[Annotated[tuple[Name, ...], Field(min_length=1), FailFast()], ...], Field(min_length=1), FailFast()
    ]


def read_quantization(path: str | os.PathLike[str]) -> Quantization:
    """What a file says, in JSON. Raises QuantizationUnreadable."""
    try:
        return Quantization.model_validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        raise QuantizationUnreadable(
            f"{os.fspath(path)} does not say what trainers quantize: {error}",
            remedy="write it with python -m stagingd_vllm.plan_command --quantization-file",
        ) from error
