# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension for an engine that quantizes to FP8 on a CPU, and that can be held in the middle of an update;
imported in the worker only."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from fp8_on_cpu import scaled_fp8_quant
from stagingd_vllm.carriers import HostCarrier
from stagingd_vllm.extension import Worker, attachment_of
from stagingd_vllm.move_reference import run_moves
from tiny_engines import TellingExtension
from vllm import _custom_ops

_custom_ops.scaled_fp8_quant = scaled_fp8_quant  # before the model is loaded


class Held:
    """Carries out half of its moves, tells its process's number at a named pipe, and waits to be killed."""

    def __init__(self, whole: HostCarrier, gate: str) -> None:
        self._whole = whole
        self._gate = Path(gate)

    def carry(self, slot: torch.Tensor) -> None:
        """Never returns."""
        moves = self._whole._moves
        run_moves(moves[: len(moves) // 2], slot)
        self._gate.write_text(str(os.getpid()))
        while True:
            signal.pause()


class HeldExtension(TellingExtension):
    """Also stops within an update, when it is told to."""

    def stagingd_hold(self: Worker, gate: str) -> None:
        """The next update is never done; ``gate`` is a named pipe."""
        parts = attachment_of(self).receiver._writer._parts
        middle = len(parts) // 2
        assert isinstance(parts[middle].weights, HostCarrier)
        parts[middle] = replace(parts[middle], weights=Held(parts[middle].weights, gate))
