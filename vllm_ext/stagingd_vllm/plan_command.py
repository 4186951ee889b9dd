# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m stagingd_vllm.plan_command``: what a worker of an engine would read of a stage."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from stagingd.dtypes import WITH_MOMENTS
from stagingd.errors import StagingError
from stagingd.formats import EngineDevice
from stagingd_vllm.plan import PlanEntry, ReadPlan, StagedTensor

HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header: what the format allows."""

PIPED_WIDTH = 240
"""Columns of what is not printed on a terminal: no name is cut."""

DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
"""The dtypes of safetensors by their names."""

_SHAPES: TypeAdapter[dict[str, tuple[int, ...]]] = TypeAdapter(dict[str, tuple[int, ...]])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class CheckpointUnreadable(StagingError):
    """The names and shapes of a checkpoint's tensors cannot be had."""

    code = "checkpoint_unreadable"


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model: config.json, and safetensors if any.")],
    tensor_parallel: Annotated[int, typer.Option(help="Tensor-parallel size of the engine.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Pipeline-parallel size of the engine.")] = 1,
    expert_parallel: Annotated[bool, typer.Option(help="Each rank holds whole experts.")] = False,
    rank: Annotated[int, typer.Option(help="Rank of the worker among the engine's workers.")] = 0,
    stage_dtype: Annotated[
        str | None, typer.Option(help="Dtype in which floats are staged. Default: the checkpoint's; bfloat16 without.")
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(help='JSON file {"name": [dims]} of the staged tensors, where there is no checkpoint.'),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="vLLM's online quantization of the engine, for --quantization-file.")
    ] = None,
    quantization_file: Annotated[
        Path | None,
        typer.Option(help="JSON file to write: what trainers can quantize for all workers of this engine."),
    ] = None,
    engine_device: Annotated[
        EngineDevice, typer.Option(help="On which kind of device the engine's weights are.")
    ] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Show which box of which staged tensor a vLLM worker reads, and where it goes. No GPU or engine is needed."""
    if stage_dtype is not None and stage_dtype not in WITH_MOMENTS:
        raise typer.BadParameter(f"{stage_dtype} is none of {', '.join(sorted(WITH_MOMENTS))}")
    if quantization_file is not None and quantization is None:
        raise typer.BadParameter("--quantization-file needs --quantization, such as fp8_per_tensor")
    staged = staged_as(tensors_of(model, shapes), stage_dtype)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from stagingd_vllm.offline import Worker, derive_offline, worker_config

    worker = Worker(tensor_parallel, pipeline_parallel, expert_parallel, rank)
    with worker_config(model, worker) as config:
        derived = derive_offline(config, staged, {})
    if quantization is not None and quantization_file is not None:
        from stagingd_vllm.quantized_layers import derive_quantization

        told = derive_quantization(model, worker, quantization, staged, engine_device)
        quantization_file.write_text(told.model_dump_json())
    if as_json:
        typer.echo(json.dumps(as_object(derived)))
    else:
        _show(derived)


def tensors_of(model: Path, shapes: Path | None) -> dict[str, StagedTensor]:
    """The tensors of a checkpoint, from its headers alone, or from a file of shapes.

    Raises:
        CheckpointUnreadable: there is neither, or one of them is not what it should be. Names the file.
    """
    if shapes is not None:
        return {name: StagedTensor("bfloat16", shape) for name, shape in _shapes(shapes).items()}
    tensors: dict[str, StagedTensor] = {}
    for path in _parts(model):
        tensors |= _header(path)
    return tensors


def staged_as(tensors: dict[str, StagedTensor], dtype: str | None) -> dict[str, StagedTensor]:
    """The same tensors, with those that are weights in ``dtype``, unless it is None."""
    return {
        name: StagedTensor(dtype, tensor.shape) if dtype and tensor.dtype in WITH_MOMENTS else tensor
        for name, tensor in tensors.items()
    }


def as_object(plan: ReadPlan) -> dict[str, Any]:
    """A plan as JSON takes it: parameters with their reads, what is computed, what is unread, and totals in bytes."""
    return {
        "parameters": {name: [_read(entry) for entry in entries] for name, entries in _by_parameter(plan).items()},
        "computed": [
            {"tensor": c.tensor, "bytes": c.bytes, "parameters": c.parameters, "reason": c.reason}
            for c in plan.computed
        ],
        "unread": plan.unread,
        "entries": len(plan.entries),
        "bytes_per_update": plan.bytes_per_update,
        "bytes_of_stage": plan.staged_bytes,
    }


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        return _SHAPES.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _unreadable(path, str(error), 'give a JSON object {"name": [dims]}') from error


def _parts(model: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or all."""
    index = model / "model.safetensors.index.json"
    if not index.exists():
        found = sorted(model.glob("*.safetensors"))
        if not found:
            raise _unreadable(model, "it has no safetensors", "give the names and shapes with --shapes")
        return found
    try:
        return [model / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(index, str(error), "download the checkpoint again") from error


def _header(path: Path) -> dict[str, StagedTensor]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= HEADER_LIMIT:
                raise _unreadable(path, f"its header would have {size} bytes", "download the checkpoint again")
            header = json.loads(file.read(size))
        return {
            name: StagedTensor(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}", "download the checkpoint again") from error


def _unreadable(path: Path, why: str, remedy: str) -> CheckpointUnreadable:
    return CheckpointUnreadable(f"no names and shapes of tensors in {path}: {why}", remedy=remedy, path=str(path))


def _by_parameter(plan: ReadPlan) -> dict[str, list[PlanEntry]]:
    entries: defaultdict[str, list[PlanEntry]] = defaultdict(list)
    for entry in plan.entries:
        entries[entry.region.parameter].append(entry)
    for reads in entries.values():
        reads.sort(key=lambda entry: entry.region.offset)
    return entries


def _read(entry: PlanEntry) -> dict[str, Any]:
    region = entry.region
    return {
        "tensor": entry.tensor,
        "dtype": entry.dtype,
        "offsets": entry.source.offsets,
        "lengths": entry.source.lengths,
        "region": {"offset": region.offset, "shape": region.shape, "stride": region.stride},
        "cast": entry.cast,
        "bytes": entry.bytes,
    }


def _show(plan: ReadPlan) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    table = Table("parameter", "staged tensor", "box", "at element", "bytes", title="Reads", title_justify="left")
    for name, entries in _by_parameter(plan).items():
        for i, entry in enumerate(entries):
            dtype = entry.dtype if entry.cast is None else f"{entry.dtype} -> {entry.cast}"
            box = f"{entry.source} {dtype}"
            table.add_row("" if i else name, entry.tensor, box, f"{entry.region.offset:,}", f"{entry.bytes:,}")
    console.print(table, markup=False)
    for tensor in plan.computed:
        line = f"by the model's own loader: {tensor.tensor} into {', '.join(tensor.parameters)}: {tensor.reason}"
        console.print(line, markup=False)
    if plan.unread:
        console.print(f"{len(plan.unread)} tensors lie on other ranks, or are tied: {', '.join(plan.unread[:3])} …")
    console.print(str(plan), markup=False)


def main() -> None:
    """Entry point: a refusal is one line and exit status 1, not a traceback."""
    try:
        app()
    except StagingError as error:
        typer.echo(f"stagingd: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
