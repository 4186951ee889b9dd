# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From a trainer's names and row orders to those that a stage has: the Hugging Face ones.

A trainer's parameter may be several of the stage's tensors (fused q|k|v, grouped experts), or have its
rows in another order (rotary embeddings). All of that is a change of boxes and of views: a rank maps its own
shard by itself, with no gather and no collective.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from stagingd.errors import UnknownTensor
from stagingd_client.placement import Held


@dataclass(frozen=True)
class NamedShard:
    """What a rank holds of one of the stage's tensors, as views of the trainer's own memory."""

    name: str
    part: Held


class Names(Protocol):
    """How one trainer names its tensors and orders their rows."""

    def skips(self, name: str) -> bool:
        """Whether a tensor is the trainer's alone, such as a counter of tokens per expert, and is not staged."""

    def shards(self, name: str, part: Held) -> tuple[NamedShard, ...]:
        """The stage's tensors of which a shard of the trainer's holds a part.

        Args:
            name: the trainer's name for the tensor.
            part: what this rank holds of it.

        Returns:
            Views of ``part.values``, which together are all of its elements but padding, each of them once.

        Raises:
            UnknownTensor: the stage would have no name for it; the message lists the nearest.
            WrongShape: the shard is not what a tensor of this name is like.
        """

    def aliases(self) -> Mapping[str, str]:
        """Names that readers may ask for, and the staged tensor that each stands for: tied weights are staged once."""


class SameNames:
    """The trainer's names are the stage's, as with a Hugging Face model."""

    def skips(self, name: str) -> bool:  # noqa: ARG002 - of the protocol
        """Nothing is skipped."""
        return False

    def shards(self, name: str, part: Held) -> tuple[NamedShard, ...]:
        """The shard itself."""
        return (NamedShard(name, part),)

    def aliases(self) -> Mapping[str, str]:
        """None."""
        return {}


def unknown(name: str, known: Iterable[str], *, of: str) -> UnknownTensor:
    """The error for a name that the stage has none for.

    Args:
        name: the trainer's name.
        known: the names that would have been understood.
        of: whose names they are, for the message.
    """
    near = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.4)
    hint = f"the nearest names are {', '.join(near)}" if near else "no name is near it"
    return UnknownTensor(
        f"tensor {name!r} has no Hugging Face name, as {of} has it: {hint}",
        remedy="correct the name, or do not stage the tensor",
        tensor=name,
    )
