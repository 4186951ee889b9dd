# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The dtypes that a stage can hold, by the names that torch and safetensors configurations use."""

from __future__ import annotations

from typing import Final

ITEM_BYTES: Final[dict[str, int]] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Bytes per element."""

WITH_MOMENTS: Final[frozenset[str]] = frozenset({"bfloat16", "float16", "float32"})
"""The dtypes that weights come in: these, and only these, have moments."""
