# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The moving kernel against its reference in torch: under Triton's interpreter on CPUs, compiled where a GPU is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from move_sets import FLOATS, QUANTIZED, WIDE, MoveSet, aligned, halfway, move_sets, values, wide
from stagingd_vllm.crossings import NARROWEST_BESIDE, crossings
from stagingd_vllm.move_reference import run_moves
from stagingd_vllm.moves import ALIGNMENT, Kind, Move, MoveRefused, Scales, Treatment, table

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from stagingd_vllm.gpu_moves import MovesOnGpu  # noqa: E402

EXAMPLES = 12 if ON_GPU else 40
"""A GPU's compiler takes its time for every kind."""


def by_reference(made: MoveSet) -> torch.Tensor:
    """Live memory after the reference has carried the moves out."""
    live = aligned(made.live.numel())
    live.copy_(made.live)
    run_moves(made.at(live.data_ptr()), made.slot)
    return live


def by_kernel(made: MoveSet, programs: int = 64) -> torch.Tensor:
    """Live memory after the kernel has: the slot stays in host memory, the rest is on the device."""
    slot = aligned(made.slot.numel(), pinned=ON_GPU)
    slot.copy_(made.slot)
    live = aligned(made.live.numel(), DEVICE)
    live.copy_(made.live)
    MovesOnGpu(table(made.at(live.data_ptr())), torch.device(DEVICE)).run(slot.data_ptr(), programs)
    return live.cpu()


def by_way_of_buffers(made: MoveSet, size: int) -> torch.Tensor:
    """Live memory after the kernel has, from buffers on the device where it can."""
    slot = aligned(made.slot.numel(), pinned=ON_GPU)
    slot.copy_(made.slot)
    live, buffer = aligned(made.live.numel(), DEVICE), aligned(size, DEVICE)
    live.copy_(made.live)
    cut = crossings(made.at(live.data_ptr()), size, NARROWEST_BESIDE)
    for crossing in cut.buffered:
        for copy in crossing.copies:
            rows = slot[copy.source :].as_strided((copy.rows, copy.width), (copy.pitch, 1))
            buffer[copy.place : copy.place + copy.bytes] = rows.reshape(-1).to(DEVICE)
        MovesOnGpu(table(crossing.moves), torch.device(DEVICE)).run(buffer.data_ptr())
    MovesOnGpu(table(cut.direct), torch.device(DEVICE)).run(slot.data_ptr())
    return live.cpu()


@settings(deadline=None, max_examples=EXAMPLES)
@given(move_sets(), st.integers(2048, 2**16))
def test_from_buffers_the_kernel_writes_what_the_reference_does(made: MoveSet, size: int) -> None:
    assert torch.equal(by_way_of_buffers(made, size), by_reference(made))


@settings(deadline=None, max_examples=EXAMPLES)
@given(move_sets(), st.sampled_from((1, 2, 64)))
def test_the_kernel_does_what_its_reference_does_and_nothing_else(made: MoveSet, programs: int) -> None:
    assert torch.equal(by_kernel(made, programs), by_reference(made))


def one(staged: np.ndarray, dtype: str, live: str, treatment: Treatment, scales: Scales | None) -> MoveSet:
    """One matrix with 256 columns and the scales 0.0371, 1 and 2**-9, of which row r has number r % 3."""
    rows = staged.nbytes // (256 * torch.empty(0, dtype=getattr(torch, dtype)).element_size())
    memory = torch.full((1024 + rows * 256 * 4,), 0xA5, dtype=torch.uint8)
    memory[:12] = torch.tensor([0.0371, 1.0, 2.0**-9]).view(torch.uint8)
    move = Move(0, 256, 1, rows, 256, 1024, 256, 1, dtype, live, treatment, scales)
    return MoveSet([move], torch.from_numpy(staged.view(np.uint8).copy()), memory)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("treatment", QUANTIZED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_of_16_bits_is_quantized_alike(dtype: str, treatment: Treatment, number: int) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    made = one(every, dtype, QUANTIZED[treatment], treatment, Scales(4 * number))
    assert torch.equal(by_kernel(made), by_reference(made))


CONVERSIONS = [(staged, live) for staged in FLOATS for live in FLOATS if staged != live]


@pytest.mark.parametrize(("staged", "live"), CONVERSIONS)
def test_every_value_of_16_bits_and_many_of_32_convert_alike(staged: str, live: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    if staged == "float32":  # those of bfloat16, and about them what decides how they are rounded
        below = np.random.default_rng(3).choice([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], 2**16).astype(np.uint32)
        bits = (bits.astype(np.uint32) << 16) | below
    made = one(bits, staged, live, Treatment.CONVERT, None)
    by_one, by_other = (
        found[1024:].view(getattr(torch, live))[: 2**16] for found in (by_kernel(made), by_reference(made))
    )
    assert torch.equal(by_one.isnan(), by_other.isnan())  # which NaN it is differs between processors
    assert torch.equal(by_one.isnan() | (by_one == by_other), torch.ones(2**16, dtype=torch.bool))
    assert torch.equal(by_one.signbit() | by_one.isnan(), by_other.signbit() | by_other.isnan())


@pytest.mark.parametrize("treatment", QUANTIZED)
def test_fp32_is_quantized_alike(treatment: Treatment) -> None:
    some = values(np.random.default_rng(4), "float32", 2**16, poisoned=True)
    made = one(some, "float32", QUANTIZED[treatment], treatment, Scales(0, row_cell=100))
    assert torch.equal(by_kernel(made), by_reference(made))


@pytest.mark.parametrize("case", WIDE)
def test_aligned_matrices_are_moved_alike(case: str) -> None:
    assert table(WIDE[case].at(ALIGNMENT))[0].kind.aligned
    assert torch.equal(by_kernel(WIDE[case], programs=3), by_reference(WIDE[case]))


@pytest.mark.parametrize("treatment", QUANTIZED)
def test_halfway_cases_are_quantized_alike(treatment: Treatment) -> None:
    assert torch.equal(by_kernel(halfway(treatment)), by_reference(halfway(treatment)))


def test_a_nan_is_the_greatest_peak() -> None:
    made = wide(64, 768, Treatment.PEAK, (1, 0))
    made.slot.view(torch.bfloat16)[5 * 768 + 9] = -torch.nan
    for found in (by_kernel(made), by_reference(made)):
        assert found[:4096].view(torch.float32).isnan().nonzero().tolist() == [[5 * 16]]


def test_cases_take_every_kind_of_tile() -> None:
    kinds: list[Kind] = [part.kind for made in WIDE.values() for part in table(made.at(ALIGNMENT))]
    assert {kind.tile_columns for kind in kinds} >= {8192, 2048, 256}
    assert {kind.group for kind in kinds if kind.treatment is Treatment.PEAK} == {8192, 256, 128, 8}
    assert {(kind.per_row, kind.per_column) for kind in kinds} == {(False, False), (True, False), (True, True)}


def test_compiled_for_a_gpu_it_rounds_as_it_should_and_moves_whole_vectors(tmp_path: Path) -> None:
    """What the interpreter cannot show: that it compiles at all, and to which instructions."""
    compiling = Path(__file__).with_name("compiled_moves.py")
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    surroundings |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, compiling], check=False, env=surroundings, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == WIDE.keys()
    for case, assembly in found.items():
        assert re.search(r"ld\.global\.L1::evict_first[.:\w]*\.v4", assembly)  # not past L1: see the kernel
        assert ".ftz" not in assembly
        assert not re.search(r"div\.(full|approx)|rcp\.", assembly)
        if "peak" in case:
            assert re.search(r"(red|atom)\.global\.gpu\.relaxed\.max\.s32", assembly)
            continue
        assert "st.global.v4" in assembly
        quantized = WIDE[case].moves[0].treatment in QUANTIZED
        assert ("div.rn.f32" in assembly) == quantized
        assert ("cvt.rn.satfinite.e4m3x2.f32" in assembly) == (quantized and case != "int8")


def test_one_table_serves_both_slots() -> None:
    made = WIDE["a scale per row"]
    live = aligned(made.live.numel(), DEVICE)
    live.copy_(made.live)
    moves = MovesOnGpu(table(made.at(live.data_ptr())), torch.device(DEVICE))
    for slot in (made.slot.flip(0), made.slot):
        placed = aligned(slot.numel(), pinned=ON_GPU)
        placed.copy_(slot)
        moves.run(placed.data_ptr())
        assert torch.equal(live.cpu(), by_reference(MoveSet(made.moves, slot, made.live)))


def test_a_slot_that_is_not_aligned_is_refused() -> None:
    moves = MovesOnGpu((), torch.device(DEVICE))
    assert moves.nbytes == 0
    with pytest.raises(MoveRefused, match="not aligned to 16 bytes"):
        moves.run(4104)
