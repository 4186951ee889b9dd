# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What vLLM makes of weights after loading, made anew where it was: decode graphs hold its addresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from stagingd_vllm.layouts import LayoutUnknown

MADE_ANEW = frozenset({"MLAAttention"})
"""Multi-head latent attention keeps parts of ``kv_b_proj`` in layouts of its own (W_UV, W_UK_T), dequantized."""


def made_anew(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The modules of a live model that derive something from their weights, with their names."""
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in MADE_ANEW]


def refresh_derived(modules: Iterable[tuple[str, Any]], dtype: torch.dtype) -> None:
    """Have modules make anew what they derive from weights that were written; vLLM's configuration has to be current.

    Args:
        modules: as ``made_anew`` finds them.
        dtype: of the model's activations.

    Raises:
        LayoutUnknown: what is made anew has another shape or dtype than what was there.
    """
    for name, module in modules:
        before = dict(_tensors(module))
        module.process_weights_after_loading(dtype)
        for attribute, old in before.items():
            _put_back(name, module, attribute, old)


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Its own tensors: parameters, buffers, and plain attributes."""
    for attributes in (module._parameters, module._buffers, vars(module)):
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                yield name, value


def _put_back(layer: str, module: torch.nn.Module, attribute: str, old: torch.Tensor) -> None:
    new = getattr(module, attribute)
    if new is old or (new.data_ptr(), new.shape, new.stride()) == (old.data_ptr(), old.shape, old.stride()):
        return
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise LayoutUnknown(
            f"{layer}.{attribute} was {old.dtype} {tuple(old.shape)} and is made anew as {new.dtype} "
            f"{tuple(new.shape)}",
            remedy="detach from the stage, and use vLLM's own reload for this model",
            parameter=f"{layer}.{attribute}",
        )
    old.data.copy_(new)
    setattr(module, attribute, old)
