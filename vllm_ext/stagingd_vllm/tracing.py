# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Watching a model's own ``load_weights`` work on tensors without memory.

Every view of a tensor shares the identity of its storage, so that a copy tells by itself which staged
tensor it reads and which parameter it writes, whatever slices and transpositions came before. No table of
architectures or of operations is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stagingd_vllm.plan import PlanRefused, StagedTensor, Write
from stagingd_vllm.views import View

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]

_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
_LOADER_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_REMEDY = "this loader cannot be repeated by reads in place; load this model with vLLM's own loader"


def trace_loader(
    load_weights: LoadWeights,
    staged: Mapping[str, StagedTensor],
    parameters: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str] | None = None,
) -> list[Write]:
    """Records every write that ``load_weights`` makes to ``parameters`` when given all of ``staged``.

    Nothing is written: copies and fills are recorded and dropped.

    Args:
        load_weights: takes an iterable of (name, tensor), as a vLLM model does.
        staged: the tensors to hand over, in this order, as meta tensors of their dtypes and global shapes.
        parameters: the meta parameters that the loader writes.
        aliases: further names under which staged tensors are handed over. Writes tell the tensor's own name.

    Raises:
        PlanRefused: the loader computes with a staged tensor, writes a parameter from something else, writes
            memory that is no parameter, or itself refuses a tensor. Names the tensor or parameter.
    """
    sources = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        for name, tensor in staged.items()
    }
    handed: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        again = [(alias, sources[name]) for alias, name in (aliases or {}).items()]
        for name, tensor in [*sources.items(), *again]:
            handed.append(name)
            yield name, tensor

    recorder = _Recorder(sources, parameters)
    with torch.no_grad(), recorder:
        try:
            load_weights(weights())
        except _LOADER_ERRORS as error:
            last = handed[-1] if handed else "any tensor"
            raise PlanRefused(
                f"the model's own loader refuses {last}: {type(error).__name__}: {error}",
                remedy="check that the stage holds this model, with its names and shapes",
                tensor=last,
            ) from error
    return recorder.writes


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records writes to parameters; lets only views of the sources through."""

    def __init__(self, sources: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes: list[Write] = []
        self._sources = sources
        self._parameters = parameters
        self._source_names = {_storage(tensor): name for name, tensor in sources.items()}
        self._parameter_names: dict[int, str] = {}
        for name, parameter in parameters.items():
            self._parameter_names.setdefault(_storage(parameter), name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = _written(func, args, kwargs)
        tensor = self._source_among([*args[1:], kwargs] if target is not None else [args, kwargs])
        if target is not None and _storage(target) in self._source_names:
            raise _refusal(f"the loader changes staged tensor {self._source_names[_storage(target)]} by {func}")
        if target is not None and _storage(target) in self._parameter_names:
            return self._write(func, target, args)
        if target is not None and (tensor is not None or not target.is_meta):
            raise _refusal(f"the loader writes {tensor or 'a constant'} by {func} to memory that is no parameter")
        if tensor is not None and not _is_view(func):
            raise _refusal(f"the loader computes with staged tensor {tensor}: {func}", tensor=tensor)
        return func(*args, **kwargs)

    def _source_among(self, values: object) -> str | None:
        names = (self._source_names.get(_storage(v)) for v in tree_leaves(values) if isinstance(v, torch.Tensor))
        return next((name for name in names if name is not None), None)

    def _write(self, func: Any, target: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        parameter = self._parameter_names[_storage(target)]
        if target.dtype != self._parameters[parameter].dtype:
            raise _refusal(f"the loader writes parameter {parameter} as {target.dtype}", parameter=parameter)
        if func in _FILLS:
            self.writes.append(Write(parameter, _view(target)))
            return target
        source = args[1] if func is torch.ops.aten.copy_.default else None
        tensor = None if source is None else self._source_names.get(_storage(source))
        if source is None or tensor is None:
            raise _refusal(
                f"the loader writes parameter {parameter} from no staged tensor: {func}", parameter=parameter
            )
        if source.dtype != self._sources[tensor].dtype or source.numel() != target.numel():
            raise _refusal(f"the loader reinterprets or repeats {tensor} in {parameter}", tensor=tensor)
        # copy_ may add leading dims of size 1 on the target's side.
        self.writes.append(Write(parameter, _view(target), tensor, _view(source.expand(target.shape))))
        return target


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _view(tensor: torch.Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that an operation changes, by its schema."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                return value
    return None


def _is_view(func: Any) -> bool:
    """Whether all that an operation returns are views of what it was given, by its schema."""
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None for value in returns)


def _refusal(what: str, **context: str) -> PlanRefused:
    return PlanRefused(what, remedy=_REMEDY, **context)
