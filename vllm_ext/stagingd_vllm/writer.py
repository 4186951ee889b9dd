# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Writing versions to where a worker's parameters live, or to shadows of them, quantized on the way."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from stagingd.boxes import whole
from stagingd.catalog import Catalog
from stagingd.moments import StoredMoments
from stagingd.progress import Needs
from stagingd_vllm.carriers import Carrier, carrier
from stagingd_vllm.copy_engine import CopyEngine
from stagingd_vllm.layouts import Home
from stagingd_vllm.leased import LeasedVersion
from stagingd_vllm.live_scales import LiveScales
from stagingd_vllm.plan import ReadPlan
from stagingd_vllm.recipe import in_parts, in_slot_order, make_recipe
from stagingd_vllm.scales import ScaleRule


@dataclass(frozen=True)
class Part:
    """Some of the parameters: what has to be there of a version, their scales, and who writes their weights.

    ``measured`` is whether the scales are made of what trainers quantize, whose moments are there before its bytes.
    """

    needs: Needs
    measured: bool
    scales: LiveScales
    weights: Carrier


class Writer:
    """Writes all that a plan reads in boxes. All but the version is worked out once.

    Args:
        plan: what is read, and to which region of which parameter, as the loader sees it.
        homes: where these parameters are.
        catalog: the stage's.
        rule: how scales follow from moments.
        device: where the parameters are.
        beside: whether the device computes meanwhile; then the writes take the smallest share that they can, and go in
            the order in which trainers flush.
        through: what brings the weights' bytes to the device; kernels read them from the slot without it.

    Raises:
        PlanRefused, OutOfOrder: as ``make_recipe`` says.
    """

    def __init__(
        self,
        plan: ReadPlan,
        homes: Mapping[str, Home],
        catalog: Catalog,
        rule: ScaleRule,
        device: torch.device,
        *,
        beside: bool = False,
        through: CopyEngine | None = None,
    ) -> None:
        self._beside = beside
        self._device = device
        self._through = through
        self._trainers_quantize = catalog.format is not None
        self._parts = []
        for part in in_slot_order(plan, homes, catalog) if beside else in_parts(plan, homes):
            scaled = {entry.tensor for entry in part.entries if homes[entry.region.parameter].scheme is not None}
            needs = _needs(part, scaled, catalog)
            measured = all(catalog.tensor(name).quantized_from is not None for name in scaled)
            recipe = make_recipe(part, homes, catalog, rule)
            scales = LiveScales(recipe, device, beside=beside)
            if through is None:
                weights: Carrier = carrier(recipe.moves, device, beside=beside)
            else:
                weights = through.carrier(recipe.moves, beside=beside)
            self._parts.append(Part(needs, measured, scales, weights))

    def write(self, lease: LeasedVersion) -> None:
        """Write a version; on a GPU this is work of the current stream, and has to be done before the next.

        Raises:
            LeaseLost: it was leased early, and aborted.
        """
        if self._beside:
            self._write_beside(lease)
        else:
            self._write_in_place(lease.slot, lease.stored)

    def _write_in_place(self, slot: torch.Tensor, stored: StoredMoments) -> None:
        if self._through is not None:
            self._through.begin()
        # The scales of a part are worked out while the bytes of the one before cross.
        for part in self._parts:
            with self._through.ahead() if self._through else nullcontext():
                part.scales.set(slot, stored)
            part.weights.carry(slot)

    def _write_beside(self, lease: LeasedVersion) -> None:
        """A copy that waits for a kernel holds up all later copies to the device, the engine's too: so scales go first.

        Of a version that lands meanwhile, other moments than of what trainers quantize come with the boxes. The scales
        that are made of them go between the copies, once no kernel is waited for.
        """
        if self._trainers_quantize:
            lease.await_moments()
        final = [part.measured or not lease.early for part in self._parts]
        for part in itertools.compress(self._parts, final):
            part.scales.set(lease.slot, lease.stored)
        for part, is_set in zip(self._parts, final, strict=True):
            lease.await_boxes(part.needs)
            if not is_set:
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()
                part.scales.set(lease.slot, lease.stored)
            part.weights.carry(lease.slot)


def _needs(part: ReadPlan, scaled: Collection[str], catalog: Catalog) -> Needs:
    """What is read; of tensors with scales all, as these are made of the moments of whole tensors."""
    wholes = ((name, whole(catalog.tensor(name).shape)) for name in scaled)
    return Needs.of_boxes(catalog, [*wholes, *((entry.tensor, entry.source) for entry in part.entries)])
