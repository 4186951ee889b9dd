# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of modules, found once: a version only looks up what stands in each place by then.

FSDP swaps a module's parameters between sharded and gathered ones, so it is the places that are remembered,
not the tensors. No collective is run, as taking the state dict of some models would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from stagingd.errors import BoxDoubled

_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class _Place:
    name: str
    owner: Mapping[str, torch.Tensor | None]
    key: str
    cast: bool


class Modules:
    """Parameters and persistent buffers, each once, by the names that the modules' state dicts have.

    Args:
        modules: one, or the parts of a model that this rank has (as with pipeline parallelism).

    Raises:
        BoxDoubled: two modules have different tensors of one name.
    """

    def __init__(self, modules: nn.Module | Iterable[nn.Module]) -> None:
        self.modules = (modules,) if isinstance(modules, nn.Module) else tuple(modules)
        self._places: dict[str, _Place] = {}
        self.tied: dict[str, str] = {}
        """Further names of tensors that stand in several places, each with the first one."""
        names: dict[int, str] = {}
        for place in (place for module in self.modules for place in _places(module)):
            tensor = place.owner[place.key]
            if tensor is None:
                continue
            first = names.setdefault(id(tensor), place.name)
            if first != place.name:
                self.tied[place.name] = first
            elif place.name not in self._places:
                self._places[place.name] = place
            elif self._places[place.name].owner[self._places[place.name].key] is not tensor:
                raise BoxDoubled(
                    f"two modules have a tensor {place.name!r}",
                    remedy="give the parts of one model, whose names differ, or name them apart",
                    tensor=place.name,
                )

    def are(self, modules: nn.Module | Iterable[nn.Module]) -> bool:
        """Whether these are the modules that were looked through."""
        given = (modules,) if isinstance(modules, nn.Module) else tuple(modules)
        return len(given) == len(self.modules) and all(a is b for a, b in zip(given, self.modules, strict=True))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What stands in each place now."""
        for name, place in self._places.items():
            tensor = place.owner[place.key]
            if tensor is not None:
                yield name, tensor

    @property
    def buffers(self) -> frozenset[str]:
        """Names of buffers: they keep their dtype, as a router's bias is in fp32 on purpose."""
        return frozenset(name for name, place in self._places.items() if not place.cast)


def _places(module: nn.Module) -> Iterator[_Place]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key in owner._parameters:
            yield _Place(_plain_name(prefix, key), owner._parameters, key, cast=True)
        for key in owner._buffers:
            if key not in owner._non_persistent_buffers_set:
                yield _Place(_plain_name(prefix, key), owner._buffers, key, cast=False)


def _plain_name(prefix: str, key: str) -> str:
    return ".".join(part for part in (*prefix.split("."), key) if part and part not in _WRAPPERS)
