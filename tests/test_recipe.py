# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Cutting a plan into parts, so that the scales of one are worked out while another's bytes cross."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from live_model import Parallel
from stagingd_vllm.layouts import homes
from stagingd_vllm.recipe import in_parts

WORKERS = {scheme: Parallel(scheme, 0, 1) for scheme in ("plain", "fp8_per_block", "int8_per_channel_weight_only")}


@given(st.sampled_from(sorted(WORKERS)), st.integers(1, 12))
def test_parts_together_are_the_plan_and_none_shares_a_parameter_with_another(scheme: str, parts: int) -> None:
    worker = WORKERS[scheme]
    cut = list(in_parts(worker.plan, homes(worker.model), parts))
    assert sorted((entry for part in cut for entry in part.entries), key=worker.plan.entries.index) == worker.entries
    for one, other in itertools.combinations(cut, 2):
        assert not set(one.parameters) & set(other.parameters)


@given(st.integers(1, 12))
def test_what_has_no_scale_comes_first_and_the_rest_in_no_more_parts_than_asked_for(parts: int) -> None:
    worker = WORKERS["fp8_per_block"]
    plain, *quantized = in_parts(worker.plan, homes(worker.model), parts)
    assert plain.parameters == ("norm.weight", "embed.weight")
    assert 1 <= len(quantized) <= parts
    sizes = [part.bytes_per_update for part in quantized]
    whole = [sum(entry.bytes for entry in part.entries) for part in in_parts(worker.plan, homes(worker.model), 1000)]
    assert max(sizes) <= sum(sizes) / parts + max(whole[1:])
