# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One pass over shards on a GPU: cast to the dtype that is quantized from, quantize, pack into scratch memory.

``stagingd_client.quantize`` is the reference that it is held to, to the bit.
"""

from __future__ import annotations

from stagingd.moments import BLOCK
from stagingd_client.gpu_moments import INTERPRETED, POINTED
from stagingd_client.quantize_kernel import quantize_kernel
from stagingd_client.strips import JOB_COLUMNS, QuantizingWork

WARPS = 8


def quantize_strips(work: QuantizingWork) -> None:
    """Cast, quantize and pack, on the current stream."""
    kind = work.kind
    quantize_kernel[(work.count,)](
        work.jobs,
        work.strips,
        work.first_strip,
        work.scratch,
        work.scales,
        SOURCE=POINTED[kind.source],
        STAGED=POINTED[kind.staged],
        FORMAT=str(work.stage_format),
        DENSE=kind.dense,
        ALIGNED=kind.aligned,
        FULL=kind.full,
        EDGE=BLOCK,
        JOB_COLUMNS=JOB_COLUMNS,
        BY_HAND=INTERPRETED,
        num_warps=WARPS,
    )
