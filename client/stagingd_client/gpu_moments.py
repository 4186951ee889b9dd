# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One pass over shards on a GPU: cast to the staged dtype, pack into scratch memory, take moments of every grid.

``stagingd_client.moments`` is the reference that it is held to: amax and non-finite counts to the bit, mean and
M2 to fp32's rounding. ``stagingd_client.strips`` says what it is told.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from stagingd.moments import BLOCK
from stagingd_client.strip_kernel import strips_kernel
from stagingd_client.strips import JOB_COLUMNS, Work

WARPS: Final = 16
INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter, which runs the kernel on a CPU, truncates where GPUs round."""

POINTED: Final = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""What a kernel's pointers point to."""


def cast_strips(work: Work) -> None:
    """Cast, pack if the kind says so, and take moments, on the current stream."""
    kind = work.kind
    strips_kernel[(work.count,)](
        work.jobs,
        work.strips,
        work.first_strip,
        work.scratch,
        work.cells,
        work.cells.stride(0),
        work.partials,
        work.partials.stride(0),
        SOURCE=POINTED[kind.source],
        DENSE=kind.dense,
        ALIGNED=kind.aligned,
        FULL=kind.full,
        PACKED=kind.packed,
        WITH_ROWS=work.with_rows,
        WITH_BLOCKS=work.with_blocks,
        EDGE=BLOCK,
        JOB_COLUMNS=JOB_COLUMNS,
        BY_HAND=INTERPRETED,
        num_warps=WARPS,
    )
