# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What crosses a process boundary: immutable, typed, validated on arrival."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Base of catalogs and messages: no field may be missing, unknown or of another type."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


Name = Annotated[str, Field(min_length=1, max_length=512)]
STAGE_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
StageName = Annotated[str, Field(pattern=rf"^{STAGE_NAME}$")]
Rank = Annotated[int, Field(ge=0, lt=1 << 14)]
RankCount = Annotated[int, Field(ge=1, le=1 << 14)]
Version = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]
Elapsed = Annotated[float, Field(ge=0, le=7 * 24 * 3600)]
"""Seconds that have passed."""
