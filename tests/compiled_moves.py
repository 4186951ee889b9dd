# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Compile the moving kernel for a Hopper GPU, which need not be there, and print its assembly, as JSON by case.

A process of its own: where Triton interprets kernels, it does not compile any.
"""

from __future__ import annotations

import json

import triton
from move_sets import WIDE
from stagingd_vllm.gpu_moves import constants
from stagingd_vllm.move_kernel import moves_kernel
from stagingd_vllm.moves import ALIGNMENT, table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)


def compiled(case: str) -> str:
    """The PTX of the kind that a case takes."""
    fixed = {**constants(table(WIDE[case].at(ALIGNMENT))[0].kind), "BY_HAND": False}
    given = {"slot": "i64", "jobs": "*i64", "tiles": "*i32", "count": "i32"}
    names = moves_kernel.arg_names
    assert set(names) == {*given, *fixed}
    source = ASTSource(
        fn=moves_kernel,
        signature={name: given.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("jobs", "tiles")},
    )
    return str(triton.compile(source, target=HOPPER, options={"num_warps": 8}).asm["ptx"])


if __name__ == "__main__":
    print(json.dumps({case: compiled(case) for case in WIDE}))
