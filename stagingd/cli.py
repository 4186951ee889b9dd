# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``stagingd``."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from stagingd import demo as demo_run
from stagingd import live, logs, units, wire
from stagingd.config import Settings
from stagingd.connection import Connection
from stagingd.daemon import Daemon
from stagingd.doctor import display, examination
from stagingd.doctor.wanted import Wanted
from stagingd.errors import StagingError
from stagingd.history import VERSIONS
from stagingd.screen import screen
from stagingd.seen import SHOWN_VERSIONS, as_plain, look
from stagingd.supervisor import Supervisor
from stagingd.trace import chrome_trace

app = typer.Typer(
    help="Stage model weights in shared host memory between trainers and inference engines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RuntimeDir = Annotated[
    Path | None, typer.Option(readable=False, help="Folder of the sockets. Default: STAGINGD_RUNTIME_DIR.")
]
OneStage = Annotated[str | None, typer.Option(help="Only this stage. Default: all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def _settings(**given: Any) -> Settings:
    """Settings from the environment, with what was given on the command line before them."""
    return Settings(**{name: value for name, value in given.items() if value is not None})


@app.command()
def serve(
    runtime_dir: RuntimeDir = None,
    segment_prefix: Annotated[str | None, typer.Option(help="Start of the segments' names.")] = None,
    lock_memory: Annotated[bool | None, typer.Option(help="Lock segments into physical memory.")] = None,
    group: Annotated[str | None, typer.Option(help="Unix group that may connect.")] = None,
    lease_s: Annotated[
        float | None, typer.Option(help="Longest time an engine may hold a version, in seconds.")
    ] = None,
    return_s: Annotated[
        float | None, typer.Option(help="How long clients wait for a successor should the daemon die, in seconds.")
    ] = None,
    heartbeat_s: Annotated[
        float | None,
        typer.Option(help="Serve clients in pid namespaces that the daemon does not see, dead after so much silence."),
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Serve metrics, health and the status page over HTTP at this port.")
    ] = None,
    http_host: Annotated[str | None, typer.Option(help="Address at which they are served.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="json or console.")] = None,
) -> None:
    """Run the daemon until SIGTERM or SIGINT."""
    settings = _settings(**locals())
    logs.configure(settings)
    Daemon(settings, Supervisor.from_environment(os.environ)).run()


@app.command()
def status(runtime_dir: RuntimeDir = None, stage: OneStage = None, as_json: AsJson = False) -> None:
    """Show every stage: versions, who fills, who reads, how fast, and what is waited for."""
    with Connection(_settings(runtime_dir=runtime_dir).control_socket, name="stagingd status") as connection:
        seen = look(connection, last=SHOWN_VERSIONS, stage=stage)
    if as_json:
        typer.echo(json.dumps(as_plain(seen)))
    else:
        Console().print(screen(seen))


@app.command()
def top(
    runtime_dir: RuntimeDir = None,
    stage: OneStage = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show every stage as ``status`` does, again and again. Ends with q or Ctrl-C."""
    with Connection(_settings(runtime_dir=runtime_dir).control_socket, name="stagingd top") as connection:
        live.show(partial(look, connection, last=SHOWN_VERSIONS, stage=stage), interval, Console())


@app.command()
def trace(
    output: Annotated[Path, typer.Option(help="File that is written.")],
    runtime_dir: RuntimeDir = None,
    stage: OneStage = None,
    versions: Annotated[int, typer.Option(min=1, max=VERSIONS, help="So many of the last of each stage.")] = 32,
) -> None:
    """Write the last versions as a trace for ui.perfetto.dev or chrome://tracing: who was busy when."""
    with Connection(_settings(runtime_dir=runtime_dir).control_socket, name="stagingd trace") as connection:
        written = chrome_trace(look(connection, last=versions, stage=stage))
    try:
        output.write_text(json.dumps(written))
    except OSError as error:
        raise typer.BadParameter(f"{output} cannot be written: {error.strerror}", param_hint="--output") from error
    typer.echo(f"{len(written['traceEvents'])} events in {output}; open it at https://ui.perfetto.dev")


@app.command()
def drop(stage: str, runtime_dir: RuntimeDir = None) -> None:
    """Give the memory of a stage back. Refused while trainers or engines are attached."""
    with (
        Connection(_settings(runtime_dir=runtime_dir).control_socket, name="stagingd drop") as connection,
        display.progress(Console(stderr=True)) as say,
    ):
        say(f"giving back the memory of stage {stage}")  # up to 0.2 s a GiB
        connection.request(wire.Drop(stage=stage), wire.Done)
    typer.echo(f"stage {stage} is gone")


@app.command()
def install_units(
    root: Annotated[Path, typer.Option(help="Folder that takes the place of /, such as an image's.")] = Path("/"),
    prefix: Annotated[Path, typer.Option(help="Where systemd looks: /etc, /usr/local/lib or /usr/lib.")] = Path("/etc"),
    program: Annotated[
        Path | None, typer.Option(help="What the units start. Default: the stagingd that runs this command.")
    ] = None,
) -> None:
    """Put the units, the user and the group of the service where systemd looks. Run it again after an upgrade."""
    for placed in units.install(program or units.this_program(), root=root, prefix=prefix):
        typer.echo(f"{placed.outcome:<9} {placed.path}")
    typer.echo("next:\n  systemd-sysusers\n  systemctl daemon-reload\n  systemctl enable --now stagingd")


@app.command()
def doctor(
    size_gib: Annotated[float | None, typer.Option(min=0.001, help="Size of one version, in GiB.")] = None,
    stage_bytes: Annotated[
        int | None, typer.Option(min=1, help="Or that of a whole stage: its segment_bytes in `status --json`.")
    ] = None,
    runtime_dir: RuntimeDir = None,
    strict: Annotated[bool, typer.Option(help="Let warnings end it with exit status 1 too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what would keep this machine from staging weights or slow it down, what that costs, and what to do.

    Exit status 0: fit to run. Warnings cost speed or safety and do not count, unless --strict.

    Exit status 1: an error keeps it from running. 2: wrong options or settings.
    """
    if size_gib is not None and stage_bytes is not None:
        raise typer.BadParameter("give --size-gib or --stage-bytes, not both")
    settings, console = _settings(runtime_dir=runtime_dir), Console(stderr=as_json)
    with display.progress(console) as say:
        report = examination.examine(Wanted.of(size_gib, stage_bytes), settings, say)
    display.show(report, console)
    if as_json:
        typer.echo(report.model_dump_json())
    raise typer.Exit(report.exit_status(strict=strict))


@app.command()
def demo(
    versions: Annotated[int, typer.Option(min=5, help="How many versions to publish and check.")] = 6,
    trainers: Annotated[int, typer.Option(min=2, help="How many FSDP2 trainer processes.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Train a small model, stage every version, and generate from it with a real vLLM engine; check everything."""
    outcome = demo_run.run(versions=versions, trainers=trainers, console=Console(stderr=as_json))
    if as_json:
        typer.echo(outcome.model_dump_json())
    raise typer.Exit(0 if outcome.ok else 1)


def main() -> None:
    """Entry point: a refusal is one line and exit status 1, not a traceback."""
    try:
        app()
    except StagingError as error:
        typer.echo(f"stagingd: {error}", err=True)
        sys.exit(1)
    except ValidationError as error:
        first = error.errors()[0]
        typer.echo(f"stagingd: setting {'.'.join(map(str, first['loc']))}: {first['msg']}", err=True)
        sys.exit(2)
