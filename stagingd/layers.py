# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The layers of a stage, by which its numeric health is told: each of its tensors, or each block of a model with many.

Daemon and workers take them from the same catalog by the same rule, so that what they tell of a layer is of the same
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

MOST_LAYERS: Final = 512
"""A stage with more tensors is told of by the blocks of its model: what is told is bounded."""

REST: Final = "(all others)"
"""Where a model has more blocks than that."""

_BLOCK: Final = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Layers:
    """The layers of a stage.

    Attributes:
        names: of the layers, in the order of their first tensors.
        of: by name of a tensor, the number of its layer.
    """

    names: tuple[str, ...]
    of: Mapping[str, int]

    @classmethod
    def from_tensors(cls, tensors: Sequence[str]) -> Layers:
        """The layers of tensors: themselves, or what their names begin with as far as the first number.

        ``model.layers.7.mlp.experts.3.up_proj.weight`` belongs to ``model.layers.7``; a name without a number is a
        layer of its own.
        """
        named = list(tensors) if len(tensors) <= MOST_LAYERS else [block_of(name) for name in tensors]
        distinct = list(dict.fromkeys(named))
        names = distinct if len(distinct) <= MOST_LAYERS else [*distinct[: MOST_LAYERS - 1], REST]
        numbers = {name: number for number, name in enumerate(names)}
        rest = len(names) - 1
        of = {tensor: numbers.get(name, rest) for tensor, name in zip(tensors, named, strict=True)}
        return cls(tuple(names), of)


def block_of(tensor: str) -> str:
    """The block of a model that a tensor belongs to; its own name, where that says none."""
    found = _BLOCK.match(tensor)
    return tensor if found is None else found[1]
