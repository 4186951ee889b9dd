# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One rank of a small live model by hand: fused q|k|v, a row-parallel projection, experts, a norm and an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from live_layers import Live, experts, linear
from stagingd_vllm.plan import PlanEntry, ReadPlan, Region

from stagingd.boxes import Box, whole

HIDDEN, HEADS, KV, INNER, EXPERTS, WORDS = 192, 256, 128, 320, 3, 40
SCHEMES = ["plain", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel_weight_only"]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint. Magnitudes differ from row to row, from tensor to tensor, and one tensor is all zeros."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        rows = torch.rand(*shape[:-1], 1, generator=generator) * 3 + 0.01
        return (torch.randn(*shape, generator=generator) * rows).bfloat16()

    made = {
        "q": weight(HEADS, HIDDEN),
        "k": weight(KV, HIDDEN) * 4,
        "v": weight(KV, HIDDEN),
        "o": weight(HIDDEN, HEADS),
        "zero": torch.zeros(HIDDEN, HEADS, dtype=torch.bfloat16),
        "norm": torch.randn(HIDDEN, generator=generator).bfloat16(),
        "embed": weight(WORDS, HIDDEN),
    }
    for number in range(EXPERTS):
        made[f"{number}.gate"], made[f"{number}.up"] = weight(INNER, HIDDEN), weight(INNER, HIDDEN)
        made[f"{number}.down"] = weight(HIDDEN, INNER)
    return made


class Parallel:
    """One tensor-parallel rank: its live model, its plan, and what its loader puts where."""

    def __init__(self, scheme: str, rank: int, ranks: int, device: str = "cpu") -> None:
        self.scheme = scheme
        self.entries: list[PlanEntry] = []
        self.parts: dict[str, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]] = {}
        self.model = torch.nn.Module()
        dense = "plain" if scheme.startswith("int8") else scheme  # the engine has INT8 for experts alone
        heads, kv, inner = HEADS // ranks, max(KV // ranks, 96), INNER // ranks
        self.model.qkv = linear(dense, heads + 2 * kv, HIDDEN, device)
        starts = {"q": (rank * heads, heads, 0), "k": (min(rank * kv, KV - kv), kv, heads)}
        starts["v"] = (starts["k"][0], kv, heads + kv)
        for name, (start, count, to) in starts.items():
            self._rows("qkv.weight", name, start, count, to, HIDDEN)
        for name in ("o", "zero"):
            self.model.add_module(name, linear(dense, HIDDEN, heads, device))
            self._columns(f"{name}.weight", name, rank * heads, heads, 0, HIDDEN)
        self.model.experts = experts(scheme, EXPERTS, inner, HIDDEN, device)
        for number in range(EXPERTS):
            w13, w2 = number * 2 * inner * HIDDEN, number * HIDDEN * inner
            self._rows("experts.w13_weight", f"{number}.gate", rank * inner, inner, w13 // HIDDEN, HIDDEN)
            self._rows("experts.w13_weight", f"{number}.up", rank * inner, inner, w13 // HIDDEN + inner, HIDDEN)
            self._columns("experts.w2_weight", f"{number}.down", rank * inner, inner, w2, HIDDEN)
        self.model.norm = Live(weight=torch.zeros(HIDDEN, dtype=torch.bfloat16, device=device))
        self._entry("norm.weight", "norm", whole((HIDDEN,)), 0, (1,))
        self.model.embed = linear("plain", WORDS, HIDDEN, device)
        self._rows("embed.weight", "embed", 0, WORDS, 0, HIDDEN)
        self.plan = ReadPlan(tuple(self.entries), 0)

    def _rows(self, parameter: str, name: str, start: int, count: int, to: int, columns: int) -> None:
        self._entry(parameter, name, Box((start, 0), (count, columns)), to * columns, (columns, 1))

    def _columns(self, parameter: str, name: str, start: int, count: int, offset: int, rows: int) -> None:
        self._entry(parameter, name, Box((0, start), (rows, count)), offset, (count, 1))

    def _entry(self, parameter: str, name: str, box: Box, offset: int, stride: tuple[int, ...]) -> None:
        self.entries.append(PlanEntry(name, "bfloat16", box, Region(parameter, offset, box.lengths, stride)))

    def loaded(self, parameter: str, shape: tuple[int, ...], full: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the loader would put into a parameter, in bf16."""
        made = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        for entry in self.entries:
            region = entry.region
            if region.parameter == parameter:
                made.as_strided(region.shape, region.stride, region.offset).copy_(
                    full[entry.tensor][entry.source.slices]
                )
        assert not made.isnan().any()
        return made
