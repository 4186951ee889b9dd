# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics: what a daemon at work tells, and that dashboards and alerts ask for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from stagingd import wire
from stagingd.engines import engine_states
from stagingd.health import Health, LayerError
from stagingd.history import History
from stagingd.layers import Layers
from stagingd.metrics import exposition
from stagingd.moments import Moments
from stagingd.web.snapshot import Snapshot, StageSnapshot

DEPLOY = Path(__file__).parent.parent / "deploy"
NOW = 100.0
WALL = 1e9


def busy_history() -> History:
    """Version 1 was sealed, read and swapped in; 2 was sealed and updated in place by rank 0; 3 is under way."""
    history = History(ranks=2)
    for version, begun in ((1, 10.0), (2, 50.0)):
        for rank in (0, 1):
            history.begun(version, version, rank, begun)
            history.measuring(version, rank, begun + 0.3)
        history.measured(version, begun + 0.4)
        for rank in (0, 1):
            history.committed(version, rank, 1000, begun + 2)
        history.sealed(version, begun + 2.001)
    for rank in (0, 1):
        history.leased(1, "rollout", rank, 12.5)
        history.released("rollout", rank, 13.5)
        history.reported(1, "swap", "rollout", rank, end_s=14.0, seconds=0.004 + rank, size=500)
    history.reported(2, "update", "rollout", 0, end_s=60.0, seconds=0.3, size=500)
    history.leased(1, "lost", 0, 15.0)
    history.lease_lost(1, "lost", 20.0)
    history.begun(3, 3, 0, 90.0)
    return history


def examined() -> Health:
    health = Health()
    health.sealed(1, 1)
    health.sealed(2, 2)
    moments = Moments(np.int64([9, 9]), np.float64([0, 1]), np.float64([1, 1]), np.float32([3, 4]), np.int64([0, 5]))
    health.examined(2, 2, moments)
    error = LayerError(layer="a", values=200, clipped=2, flushed=4, squared_error=4.0, squared_values=400.0)
    health.reported(Layers(("a", "b"), {}), 1, "rollout", 0, [error])
    return health


def busy() -> Snapshot:
    slots = (
        wire.SlotStatus(state="front", version=2, begun_ranks=(0, 1), measured_ranks=(), committed_ranks=(0, 1)),
        wire.SlotStatus(state="filling", version=3, begun_ranks=(0,), measured_ranks=(), committed_ranks=()),
    )
    status = wire.StageStatus(
        stage="policy",
        policy="latest",
        trainers=(0, 1),
        ranks=2,
        engines=("rollout", "idle"),
        tensors=7,
        segment="/x",
        segment_bytes=4096,
        slots=slots,
        leases=(
            wire.LeaseStatus(lease=1, engine="idle", version=2, awaited_ranks=(0,), reading_ranks=(0,), age_s=7.0),
        ),
        waiting=(wire.WaitingStatus(who="trainer rank 0", what="x", peers=(), waited_s=9.0),),
        sealed_versions=12,
        aborted_versions=3,
        begins_kept_waiting=2,
    )
    history = busy_history()
    stage = StageSnapshot(
        status, history.versions(64), history.totals.so_far(), history.lost_leases, ("a", "b"), examined().versions
    )
    report = wire.StatusReport(pid=1, uptime_s=5.0, connections=4, refused_messages=6, stages=(status,))
    return Snapshot(NOW, WALL, report, {"policy": stage})


def families(snapshot: Snapshot) -> dict[str, Metric]:
    body, content_type = exposition(snapshot, "")
    assert content_type.startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def value(name: str, **labels: str) -> float:
    samples = [sample for family in families(busy()).values() for sample in family.samples if sample.name == name]
    [found] = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    return float(found)


@pytest.mark.parametrize(
    ("name", "labels", "wanted"),
    [
        ("stagingd_uptime_seconds", {}, 5),
        ("stagingd_connections", {}, 4),
        ("stagingd_accepting", {}, 1),
        ("stagingd_refused_messages_total", {}, 6),
        ("stagingd_stage_info", {"policy": "latest"}, 1),
        ("stagingd_segment_bytes", {}, 4096),
        ("stagingd_trainer_ranks_attached", {}, 2),
        ("stagingd_engines_attached", {}, 2),
        ("stagingd_slot_state", {"slot": "1", "state": "filling"}, 1),
        ("stagingd_slot_state", {"slot": "1", "state": "front"}, 0),
        ("stagingd_longest_wait_seconds", {}, 9),
        ("stagingd_newest_sealed_version", {}, 2),
        ("stagingd_newest_sealed_timestamp_seconds", {}, WALL + 52.001),
        ("stagingd_filling_seconds", {}, NOW - 90),
        ("stagingd_sealed_versions_total", {}, 12),
        ("stagingd_aborted_versions_total", {}, 3),
        ("stagingd_begins_kept_waiting_total", {}, 2),
        ("stagingd_engine_version", {"engine": "rollout"}, 2),
        ("stagingd_engine_behind_versions", {"engine": "rollout"}, 0),
        ("stagingd_last_pause_seconds", {"engine": "rollout", "rank": "0"}, 0.3),
        ("stagingd_last_pause_seconds", {"engine": "rollout", "rank": "1"}, 1.004),
        ("stagingd_lease_age_seconds", {"engine": "idle"}, 7),
        ("stagingd_lost_leases_total", {}, 1),
        ("stagingd_fill_seconds_count", {}, 4),
        ("stagingd_fill_seconds_sum", {}, 8),
        ("stagingd_fill_seconds_bucket", {"le": "2.5"}, 4),
        ("stagingd_fill_seconds_bucket", {"le": "1.0"}, 0),
        ("stagingd_measure_seconds_count", {}, 4),
        ("stagingd_read_seconds_count", {}, 2),
        ("stagingd_swap_seconds_bucket", {"le": "0.005"}, 1),
        ("stagingd_update_seconds_count", {}, 1),
        ("stagingd_filled_bytes_total", {}, 4000),
        ("stagingd_swapped_bytes_total", {}, 1000),
        ("stagingd_updated_bytes_total", {}, 500),
        ("stagingd_examined_version", {}, 2),
        ("stagingd_nonfinite_values", {}, 5),
        ("stagingd_amax", {}, 4),
        ("stagingd_clipped_share", {}, 0.01),
        ("stagingd_flushed_share", {}, 0.02),
        ("stagingd_relative_error", {}, 0.1),
    ],
)
def test_a_metric_tells_what_its_name_says(name: str, labels: dict[str, str], wanted: float) -> None:
    assert value(name, **labels) == pytest.approx(wanted)


def test_what_is_not_known_has_no_series() -> None:
    found = families(
        Snapshot(NOW, WALL, wire.StatusReport(pid=1, uptime_s=5.0, connections=0, refused_messages=0, stages=()), {})
    )
    assert not [name for name, family in found.items() if any("stage" in sample.labels for sample in family.samples)]
    engines = [sample.labels["engine"] for sample in families(busy())["stagingd_engine_version"].samples]
    assert engines == ["rollout"]  # the other has read nothing


def test_openmetrics_is_given_to_who_asks_for_it() -> None:
    body, content_type = exposition(busy(), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert "stagingd_sealed_versions" in {family.name for family in openmetrics(body.decode())}


def test_a_stages_name_cannot_break_out_of_its_label() -> None:
    snapshot = busy()
    hostile = 'x"} 1\nstagingd_uptime_seconds 7'
    status = snapshot.stages["policy"].status.model_copy(update={"engines": (hostile,)})
    history = busy_history()
    history.leased(2, hostile, 0, 61.0)
    history.released(hostile, 0, 62.0)
    stage = StageSnapshot(status, history.versions(9), {}, 0, (), ())
    found = families(Snapshot(NOW, WALL, snapshot.report, {"policy": stage}))
    assert [s.labels["engine"] for s in found["stagingd_engine_version"].samples] == [hostile]
    assert [s.value for s in found["stagingd_uptime_seconds"].samples] == [5.0]


def test_a_reader_that_tells_nothing_is_known_by_what_it_has_read_of_sealed_versions() -> None:
    history = busy_history()
    history.leased(3, "early", 0, 91.0)
    history.leased(2, "plain", 0, 91.0)
    for name in ("early", "plain"):
        history.released(name, 0, 92.0)
    states = engine_states(history.versions(9), ["early", "plain", "rollout"])
    assert {name: state.version for name, state in states.items()} == {"early": None, "plain": 2, "rollout": 2}


# Dashboards and alerts


def known() -> set[str]:
    names = {sample.name for family in families(busy()).values() for sample in family.samples}
    return names | {"process_resident_memory_bytes"}


def asked(expression: str) -> set[str]:
    """The metrics of an expression: what else stands in one are functions, labels, numbers and durations."""
    without = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|without)\s*\([^)]*\)', "", expression)
    names = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\()\b", without)
    return {name for name in names if "_" in name and not re.search(rf"\b{name}\s*\(", without)}


def expressions(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [value for key, value in node.items() if key == "expr"]
        return own + [one for value in node.values() for one in expressions(value)]
    return [one for value in node for one in expressions(value)] if isinstance(node, list) else []


def test_expressions_are_taken_apart_rightly() -> None:
    found = asked('histogram_quantile(0.5, sum by (stage, le) (rate(a_b_bucket{x=~"$c_d"}[$__rate_interval]))) > e_f')
    assert found == {"a_b_bucket", "e_f"}


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads((DEPLOY / "grafana" / "stagingd.json").read_text())
    wanted = expressions(board)
    assert len(wanted) > 20
    assert {name for one in wanted for name in asked(one)} <= known()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    [stage] = [one for one in board["templating"]["list"] if one["name"] == "stage"]
    assert asked(stage["query"]["query"].removeprefix("label_values(").split(",")[0]) <= known()


def test_the_alerts_ask_for_metrics_that_there_are_and_say_what_to_do() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 9
    assert {name for rule in rules for name in asked(rule["expr"])} <= known()
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_a_scrape_is_of_the_moment() -> None:
    assert all(sample.timestamp is None for family in families(busy()).values() for sample in family.samples)


def test_the_documentation_lists_every_metric_and_no_other() -> None:
    page = (DEPLOY.parent / "docs" / "operations" / "metrics.md").read_text()
    listed = set(re.findall(r"`(stagingd_\w+)`", page))
    body, _ = exposition(busy(), "")
    there = re.findall(r"^# TYPE (stagingd_\w+) (?:gauge|counter|histogram)$", body.decode(), re.MULTILINE)
    assert set(there) == listed
