# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The command that shows a read plan: of a checkpoint by its headers, or of given shapes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stagingd_vllm.plan import StagedTensor
from stagingd_vllm.plan_command import CheckpointUnreadable, staged_as, tensors_of
from tiny_models import HEAD, HEADS, HIDDEN, MODELS

from stagingd.formats import Quantization

pytest.importorskip("vllm")

MODEL = MODELS["qwen3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two files and an index."""
    folder = tmp_path_factory.mktemp("checkpoint")
    MODEL.save_config(folder)
    weight_map: dict[str, str] = {}
    names = list(MODEL.staged())
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-{i}.safetensors"
        save_file({n: torch.zeros(MODEL.staged()[n].shape, dtype=torch.bfloat16) for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"optimizer.step": torch.zeros(1)}, folder / "elsewhere.safetensors")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stagingd_vllm.plan_command", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ})


def as_json(*arguments: object) -> dict[str, Any]:
    finished = run(*arguments, "--json")
    assert finished.returncode == 0, finished.stderr[-4000:]
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def test_the_ranks_plan_is_printed_and_what_trainers_can_quantize_for_all_ranks_is_written_to_a_file(
    checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "quantization.json"
    quantizing = ("--quantization", "fp8_per_block", "--engine-device", "cpu", "--quantization-file", file)
    finished = run(checkpoint, "--tensor-parallel", 2, "--rank", 1, *quantizing)
    assert finished.returncode == 0, finished.stderr[-4000:]
    (row,) = [line for line in finished.stdout.splitlines() if "model.layers.0.self_attn.q_proj.weight" in line]
    half = HEADS * HEAD // 2
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[0] == "model.layers.0.self_attn.qkv_proj.weight"
    assert cells[2:] == [f"[{half}:{2 * half}, 0:{HIDDEN}] bfloat16", "0", f"{half * HIDDEN * 2:,}"]
    staged = sum(tensor.bytes for tensor in MODEL.staged().values())
    assert re.search(
        rf"25 reads of 25 tensors into 19 parameters: [\d,]+ of {staged:,} bytes \(4\d%\)", finished.stdout
    )
    told = Quantization.model_validate_json(file.read_bytes())
    assert (told.format, told.device) == ("fp8_per_block", "cpu")
    # Of two ranks: 64 rows of k, and 160 of gate, up and down, lie across blocks.
    assert sorted(told.groups) == [(f"model.layers.{layer}.self_attn.o_proj.weight",) for layer in range(2)]


def test_shapes_and_a_dtype_stand_for_a_checkpoint(tmp_path: Path) -> None:
    MODEL.save_config(tmp_path)
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps({name: tensor.shape for name, tensor in MODEL.staged().items()}))
    sizes = ("--tensor-parallel", 2, "--pipeline-parallel", 2, "--rank", 3)
    of_shapes = as_json(tmp_path, *sizes, "--shapes", shapes, "--stage-dtype", "float32")
    assert of_shapes["bytes_of_stage"] == 2 * sum(tensor.bytes for tensor in MODEL.staged().values())
    reads = of_shapes["parameters"]["model.layers.1.self_attn.o_proj.weight"]
    assert [(read["offsets"], read["lengths"], read["dtype"], read["cast"]) for read in reads] == [
        ([0, HEADS * HEAD // 2], [HIDDEN, HEADS * HEAD // 2], "float32", "bfloat16")
    ]
    assert "model.layers.0.self_attn.o_proj.weight" in of_shapes["unread"]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (("--tensor-parallel", 3), "must be divisible by tensor parallel size"),
        (("--stage-dtype", "int4"), "int4 is none of bfloat16"),
    ],
)
def test_what_no_engine_does_is_one_line(checkpoint: Path, sizes: tuple[object, ...], reason: str) -> None:
    finished = run(checkpoint, *sizes)
    assert finished.returncode != 0
    assert reason in finished.stderr
    assert "Traceback" not in finished.stderr


def test_an_engine_that_does_not_quantize_is_one_line_and_no_file(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "quantization.json"
    finished = run(checkpoint, "--quantization-file", file)
    assert finished.returncode != 0
    assert "--quantization-file needs --quantization" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not file.exists()


def test_an_index_tells_which_files_are_the_checkpoint(checkpoint: Path) -> None:
    assert tensors_of(checkpoint, None).keys() == MODEL.staged().keys()
    assert set(tensors_of(checkpoint, None).values()) == set(MODEL.staged().values())


def test_without_an_index_every_file_counts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.int8)}, tmp_path / "two.safetensors")
    tensors = tensors_of(tmp_path, None)
    assert tensors == {"a": StagedTensor("float32", (2, 3)), "b": StagedTensor("int8", (4,))}
    assert staged_as(tensors, "bfloat16") == tensors | {"a": StagedTensor("bfloat16", (2, 3))}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 16),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("model.safetensors", (9).to_bytes(8, "little") + b'{"a": {}}'),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}'),
        ("other", b""),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointUnreadable, match=str(tmp_path)):
        tensors_of(tmp_path, None)


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', '{"a": [1.5]}'])
def test_broken_shapes_are_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "shapes").write_text(content)
    with pytest.raises(CheckpointUnreadable, match="shapes"):
        tensors_of(tmp_path, tmp_path / "shapes")
