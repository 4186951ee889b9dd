# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What people see of stages in a terminal: from what a daemon says to what rich draws. Pure.

First a table with a line for every stage, then each stage by itself. Names come from clients: nothing in them is
markup, and what a terminal would obey is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stagingd import wire
from stagingd.rates import Pause, pauses, rates
from stagingd.seen import Seen
from stagingd.words import ago, amount, clean, duration, ranks_of, speed

LAST_PAUSES = 3
"""Pauses of a stage that are shown."""

NAMED = 3
"""Names that are listed of many."""

STATE_STYLES = {"front": "green", "sealed": "cyan", "filling": "yellow", "draining": "magenta", "free": "dim"}


def screen(seen: Seen) -> Group:
    """All stages, however long that is."""
    return Group(_heading(seen.report), _overview(seen), *_all_details(seen))


class FittedScreen:
    """As much of all stages as there is room for: their table, then one after the other while they fit."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.height or console.size.height
        options = options.update(height=None)
        lines = console.render_lines(Group(_heading(self._seen.report), _overview(self._seen)), options, pad=False)
        details = _all_details(self._seen)
        for number, detail in enumerate(details):
            drawn = console.render_lines(detail, options, pad=False)
            more_follow = number + 1 < len(details)
            if len(lines) + len(drawn) + more_follow > room:
                left = f"{len(details) - number} stages are not shown in full; see stagingd status, or top --stage NAME"
                lines = [*lines[: room - 1], *console.render_lines(Text(left, "dim"), options, pad=False)]
                break
            lines += drawn
        for at, line in enumerate(lines[:room]):
            yield from line
            if at + 1 < min(len(lines), room):
                yield Segment.line()


def _all_details(seen: Seen) -> list[RenderableType]:
    return [_detail(stage, seen) for stage in seen.report.stages]


def _heading(report: wire.StatusReport) -> Text:
    return Text(
        f"daemon pid {report.pid}, up {duration(report.uptime_s)}, {report.connections} connections, "
        f"{report.refused_messages} messages refused, {len(report.stages)} stages"
    )


# The table of all stages


def _overview(seen: Seen) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    table.add_column("stage", overflow="fold", min_width=8)
    for name in ("newest", "filling", "readers", "a minute", "written", "pause"):
        table.add_column(name, justify="right", overflow="fold")
    for stage in seen.report.stages:
        table.add_row(*_overview_row(stage, seen))
    return table


def _overview_row(stage: wire.StageStatus, seen: Seen) -> list[Text]:
    versions = seen.histories.get(stage.stage, ())
    measured, last = rates(versions, seen.at_s), pauses(versions, 1)
    newest = [slot.version for slot in stage.slots if slot.state in ("sealed", "front") and slot.version is not None]
    filling = next((slot for slot in stage.slots if slot.state == "filling"), None)
    committed = "" if filling is None else f"{filling.version}: {len(filling.committed_ranks)}/{stage.ranks}"
    cells = (
        clean(stage.stage),
        str(max(newest)) if newest else "none",
        committed or "-",
        f"{len({lease.engine for lease in stage.leases})}/{len(stage.engines)}",
        "-" if measured.versions_a_minute is None else f"{measured.versions_a_minute:.1f}",
        speed(measured.written_bytes_s),
        duration(last[0].seconds) if last else "-",
    )
    return [Text(cell, "yellow" if stage.waiting and at == 0 else "") for at, cell in enumerate(cells)]


# One stage


def _detail(stage: wire.StageStatus, seen: Seen) -> RenderableType:
    versions = seen.histories.get(stage.stage, ())
    shown = pauses(versions, LAST_PAUSES)
    lines = [_rates_line(stage, seen), *(_pause_line(pause, seen.at_s) for pause in shown)]
    lines += [Text(f"waits: {line}", "yellow") for line in waiting_lines(stage.waiting)]
    title = Text(clean(stage.stage), "bold")
    title.append(
        f"  {stage.tensors} tensors, {amount(stage.segment_bytes)}, policy {stage.policy}, "
        f"{len(stage.trainers)} of {stage.ranks} trainer ranks, {_listed(stage.engines, 'engine')}",
        "not bold",
    )
    return Group(Text(), title, Padding.indent(_slots(stage), 2), *(Padding.indent(line, 2) for line in lines))


def _slots(stage: wire.StageStatus) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("slot", "state", "version"):
        table.add_column(name, no_wrap=True)
    table.add_column("filled by ranks", overflow="fold", ratio=1)
    table.add_column("read by", overflow="fold", ratio=1)
    for index, slot in enumerate(stage.slots):
        leases = [lease for lease in stage.leases if slot.version is not None and lease.version == slot.version]
        table.add_row(
            str(index),
            Text(slot.state, STATE_STYLES.get(slot.state, "")),
            "" if slot.version is None else str(slot.version),
            _filled_by(slot, stage.ranks),
            Text("\n").join(_lease_text(lease) for lease in leases),
        )
    return table


def _filled_by(slot: wire.SlotStatus, ranks: int) -> Text:
    if slot.state != "filling":
        return Text("" if slot.version is None else "all")
    steps = (("begun", slot.begun_ranks), ("measured", slot.measured_ranks), ("committed", slot.committed_ranks))
    return Text("\n".join(f"{name} {ranks_of(done, ranks)}" for name, done in steps if done or name != "measured"))


def _lease_text(lease: wire.LeaseStatus) -> Text:
    ranks = f"ranks {ranks_of(lease.reading_ranks)} read" if lease.reading_ranks else "no rank reads"
    awaited = sorted({*lease.awaited_ranks} - {*lease.reading_ranks})
    others = f", ranks {ranks_of(awaited)} are to come" if awaited else ""
    return Text(f"{clean(lease.engine)}: {ranks}{others}, for {duration(lease.age_s)}")


def _rates_line(stage: wire.StageStatus, seen: Seen) -> Text:
    found = rates(seen.histories.get(stage.stage, ()), seen.at_s)
    a_minute = "no rate yet" if found.versions_a_minute is None else f"{found.versions_a_minute:.1f} versions a minute"
    counts = f"{stage.sealed_versions} sealed, {stage.aborted_versions} aborted"
    if found.versions_a_minute is None:
        return Text(f"rates: {a_minute}; {counts}")
    written, applied = speed(found.written_bytes_s), speed(found.applied_bytes_s)
    return Text(f"rates: {a_minute}, {written} written, {applied} applied; {counts}")


def _pause_line(pause: Pause, now: float) -> Text:
    ranks = f", slowest of {pause.ranks} ranks" if pause.ranks > 1 else ""
    return Text(
        f"pause: {clean(pause.engine)} {duration(pause.seconds)} for the {pause.what} to version {pause.version}"
        f"{ranks}, {ago(now - pause.ended_s)}"
    )


def waiting_lines(waiting: Iterable[wire.WaitingStatus]) -> list[str]:
    """A line for everything that is awaited: who waits for the same is named together."""
    groups: dict[tuple[str, tuple[str, ...]], list[wire.WaitingStatus]] = {}
    for one in waiting:
        groups.setdefault((one.what, one.peers), []).append(one)
    lines = []
    for (what, peers), members in groups.items():
        longest = max(member.waited_s for member in members)
        who = _listed([member.who for member in members])
        verb = "waits" if len(members) == 1 else "wait"
        lines.append(f"{who} {verb} for {clean(what)}, for {duration(longest)}; awaited: {_listed(peers)}")
    return lines


def _listed(names: Sequence[str], what: str = "") -> str:
    """The first of some names, and how many there are."""
    if not names:
        return f"no {what}" if what else "nobody"
    first = ", ".join(clean(name) for name in names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{what} {first}{more}" if what else f"{first}{more}"
