# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moves carried out by a GPU: it reads the slot in registered host memory and writes live memory, with nothing between.

``stagingd_vllm.move_reference`` is the reference that it is held to, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import triton
import triton.language as tl

from stagingd_vllm.move_kernel import moves_kernel
from stagingd_vllm.moves import ALIGNMENT, JOB_COLUMNS, Kind, KindTable, MoveRefused

WARPS: Final = 8
PROGRAMS: Final = 64
"""Enough for the link's full speed with rows as narrow as 128 bytes."""
PROGRAMS_LANDED: Final = 264
"""Two for each multiprocessor, where the bytes are on the device already."""
PROGRAMS_LANDED_BESIDE: Final = 64
"""The same beside a generating engine: what is left of the device goes on with its step."""
PROGRAMS_BESIDE: Final = 4
"""Beside a generating engine: few, as large batches lose speed by every multiprocessor that is taken."""
INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter, which runs the kernel on a CPU, rounds bfloat16 and FP8 otherwise than GPUs do."""

_POINTED: Final = {
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "float32": tl.float32,
    "float8_e4m3fn": tl.uint8,  # written as bytes
    "int8": tl.int8,
    "int16": tl.int16,
    "int32": tl.int32,
    "int64": tl.int64,
}


def constants(kind: Kind) -> dict[str, Any]:
    """What the kernel is compiled with for a kind."""
    return {
        "STAGED": _POINTED[kind.staged],
        "LIVE": _POINTED[kind.live],
        "TREATMENT": str(kind.treatment),
        "TILE_ROWS": kind.tile_rows,
        "TILE_COLUMNS": kind.tile_columns,
        "DENSE": kind.dense,
        "ALIGNED": kind.aligned,
        "PER_ROW": kind.per_row,
        "PER_COLUMN": kind.per_column,
        "GROUP": kind.group,
        "JOB_COLUMNS": JOB_COLUMNS,
        "BY_HAND": INTERPRETED,
    }


class MovesOnGpu:
    """Tables of moves, put on a device once, and carried out for one version after another.

    Args:
        tables: what ``moves.table`` made of moves whose targets and scales are on the device.
        device: where. The targets' and scales' memory has to outlive this object.
    """

    def __init__(self, tables: Sequence[KindTable], device: torch.device) -> None:
        self._device = device
        self._tables = [
            (made.kind, torch.from_numpy(made.jobs).to(device), torch.from_numpy(made.tiles).to(device))
            for made in tables
        ]

    @property
    def nbytes(self) -> int:
        """Device memory that the tables take: 4 bytes per tile and 120 per move.

        Qwen3-30B-A3B whole on one device (30.5e9 parameters in 18,867 moves): 3.7 million tiles, 16.4 MiB.
        """
        return sum(jobs.nbytes + tiles.nbytes for _, jobs, tiles in self._tables)

    def run(self, slot_address: int, programs: int = PROGRAMS) -> None:
        """Start carrying all of them out, on the current stream: one launch per kind.

        Args:
            slot_address: of the slot's first byte, as the device sees it; its memory has to be registered.
            programs: how many blocks of threads share the work.

        Raises:
            MoveRefused: the slot does not begin at a multiple of 16 bytes.
        """
        if slot_address % ALIGNMENT:
            raise MoveRefused(
                f"A slot at address {slot_address} is not aligned to {ALIGNMENT} bytes",
                remedy="pass the address of a slot's first byte in a mapped stage",
            )
        with self._current():
            for kind, jobs, tiles in self._tables:
                moves_kernel[(min(programs, len(tiles)),)](
                    slot_address,
                    jobs,
                    tiles,
                    len(tiles),
                    **constants(kind),
                    num_warps=WARPS,
                )

    def _current(self) -> AbstractContextManager[object]:
        """Triton launches on torch's current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
