# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Watching a model's own ``load_weights`` work on tensors without memory.

Every view of a tensor shares the identity of its storage, so that a copy tells by itself which staged
tensor it reads and which parameter it writes, whatever slices and transpositions came before. No table of
architectures or of operations is needed. What an operation makes of staged tensors is followed in the same way:
new memory, of which it is known where it comes from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stagingd_vllm.plan import PlanRefused, StagedTensor, Write
from stagingd_vllm.views import View

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]

_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
_VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
# They look at a tensor's shape alone.
_SHAPED_LIKE = {
    *("empty_like", "zeros_like", "ones_like", "full_like"),
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
}
_LOADER_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_REMEDY = "this loader cannot be repeated by reads in place; load this model with vLLM's own loader"


def trace_loader(
    load_weights: LoadWeights,
    staged: Mapping[str, StagedTensor],
    parameters: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str] | None = None,
) -> list[Write]:
    """Records every write that ``load_weights`` makes to ``parameters`` when given all of ``staged``.

    Nothing is written: copies and fills are recorded and dropped. Every write of a tensor that the loader computes
    with is marked as computed, with the reason. Where a loader asks for a value it is given one that is made up,
    and then a second time another: what it does must not depend on it.

    Args:
        load_weights: takes an iterable of (name, tensor), as a vLLM model does.
        staged: the tensors to hand over, in this order, as meta tensors of their dtypes and global shapes.
        parameters: the meta parameters that the loader writes.
        aliases: further names under which staged tensors are handed over. Writes tell the tensor's own name.

    Raises:
        PlanRefused: the loader writes a parameter from nothing that is staged, keeps what it computes out of sight,
            does something else for another value, or itself refuses a tensor. Names the tensor or parameter.
    """
    recorder = _traced(load_weights, staged, parameters, aliases or {}, _Recorder(parameters, truth=True))
    if recorder.asked:
        again = _traced(load_weights, staged, parameters, aliases or {}, _Recorder(parameters, truth=False))
        if (again.writes, again.reasons) != (recorder.writes, recorder.reasons):
            raise _refusal(
                f"what the loader does depends on the values of {recorder.asked[0]}", tensor=recorder.asked[0]
            )
    writes = recorder.done()
    written = {write.tensor for write in writes}
    for tensor, reason in recorder.reasons.items():
        if tensor not in written:
            raise _refusal(f"{reason}, and where that ends is not seen", tensor=tensor)
    return writes


def _traced(
    load_weights: LoadWeights,
    staged: Mapping[str, StagedTensor],
    parameters: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    recorder: _Recorder,
) -> _Recorder:
    sources = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        for name, tensor in staged.items()
    }
    recorder.follow(sources)
    handed: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        again = [(alias, sources[name]) for alias, name in aliases.items()]
        for name, tensor in [*sources.items(), *again]:
            handed.append(name)
            recorder.next_tensor()
            yield name, tensor

    with torch.no_grad(), _listening(parameters, recorder), recorder:
        try:
            load_weights(weights())
        except _LOADER_ERRORS as error:
            last = handed[-1] if handed else "any tensor"
            raise PlanRefused(
                f"the model's own loader refuses {last}: {type(error).__name__}: {error}",
                remedy="check that the stage holds this model, with its names and shapes",
                tensor=last,
            ) from error
    return recorder


@contextlib.contextmanager
def _listening(parameters: Mapping[str, torch.Tensor], recorder: _Recorder) -> Iterator[None]:
    """Records which tensors a parameter's own weight loader declines, as one does for experts of other ranks."""
    loaders = {
        name: (parameter, parameter.__dict__["weight_loader"])
        for name, parameter in parameters.items()
        if "weight_loader" in parameter.__dict__
    }
    for name, (parameter, loader) in loaders.items():
        parameter.__dict__["weight_loader"] = _heard(loader, functools.partial(recorder.declined, name))
    try:
        yield
    finally:
        for parameter, loader in loaders.values():
            parameter.__dict__["weight_loader"] = loader


def _heard(loader: Callable[..., object], declined: Callable[[object], None]) -> Callable[..., object]:
    @functools.wraps(loader)
    def heard(*args: object, **kwargs: object) -> object:
        answer = loader(*args, **kwargs)
        if answer is False:
            declined([args, kwargs])
        return answer

    return heard


@dataclasses.dataclass(frozen=True, slots=True)
class _Origin:
    """Where values come from: which staged tensors, and what was done with them.

    ``reason`` is None for what is read back from a parameter. That alone is no harm.
    """

    tensors: tuple[str, ...]
    reason: str | None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records writes to parameters; lets views of the sources through, and follows what is computed from them."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], *, truth: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reasons: dict[str, str] = {}
        self.asked: list[str] = []
        self.writes: list[tuple[Write, float | None]] = []
        self._truth = truth
        self._asked_of_this: list[str] = []
        self._parameters = parameters
        self._parameter_names: dict[int, str] = {}
        for name, parameter in parameters.items():
            self._parameter_names.setdefault(_storage(parameter), name)
        self._writers: dict[str, dict[str, None]] = {name: {} for name in parameters}
        self._derived: dict[int, _Origin] = {}
        # An identity can come back when its memory is gone; what is followed is therefore kept.
        self._kept: list[torch.Tensor] = []

    def follow(self, sources: Mapping[str, torch.Tensor]) -> None:
        """Tells which tensors are the staged ones."""
        self._sources = sources
        self._source_names = {_storage(tensor): name for name, tensor in sources.items()}

    def next_tensor(self) -> None:
        """Tells that the loader is done with the tensor that it was handed before."""
        self._asked_of_this.clear()

    def declined(self, parameter: str, arguments: object) -> None:
        """Tells that a parameter's weight loader had no use for what it was given."""
        for value in tree_leaves(arguments):
            tensor = self._source_names.get(_storage(value)) if isinstance(value, torch.Tensor) else None
            if tensor is not None:
                self._add(Write(parameter, View(0, (0,), (1,)), tensor))

    def done(self) -> list[Write]:
        """All writes, each with the reason when its tensor is computed with anywhere."""
        return [
            write if write.tensor is None else dataclasses.replace(write, computed=self.reasons.get(write.tensor))
            for write, _ in self.writes
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = _written(func, args, kwargs)
        if target is not None and _storage(target) in self._parameter_names:
            return self._write(func, target, args, kwargs)
        if target is None and (_is_view(func) or func.overloadpacket.__name__ in _SHAPED_LIKE):
            return func(*args, **kwargs)
        origin = self._origin([args, kwargs], func)
        if target is not None:
            return self._write_elsewhere(func, target, origin, args, kwargs)
        if origin is None:
            return func(*args, **kwargs)
        self._mark(origin)
        if func in _VALUES:
            return self._value(func, origin, args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._derive(made, origin)
        return result

    def _write(self, func: Any, target: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        name = self._parameter_names[_storage(target)]
        parameter = self._parameters[name]
        if target.dtype != parameter.dtype:
            raise _refusal(f"the loader writes parameter {name} as {target.dtype}", parameter=name)
        source = args[1] if func is torch.ops.aten.copy_.default else None
        tensor = None if source is None else self._source_names.get(_storage(source))
        if source is not None and tensor is not None:
            if source.dtype == self._sources[tensor].dtype and source.numel() == target.numel():
                cast = None if source.dtype == parameter.dtype else str(parameter.dtype).removeprefix("torch.")
                # copy_ may add leading dims of size 1 on the target's side.
                self._add(Write(name, _view(target), tensor, _view(source.expand(target.shape)), cast))
                return target
            origin = _Origin((tensor,), f"the loader reinterprets or repeats {tensor} in {name}")
        elif func in _FILLS and not self._comes_from_a_value(args):
            self._add(Write(name, _view(target)), float(args[1]) if func is _FILLS[0] else 0.0)
            return target
        else:
            origin = self._origin_of_write(func, name, args, kwargs)
        self._mark(origin)
        for tensor in origin.tensors:
            self._add(Write(name, _view(target), tensor))
        return target

    def _origin_of_write(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Origin:
        what = f"the loader writes parameter {name} from no staged tensor: {func}"
        if func in _FILLS:
            asked = tuple(dict.fromkeys(self._asked_of_this or self.asked))
            return _Origin(asked, f"the loader fills parameter {name} with a value of {', '.join(asked)}")
        given = [args[1:], {key: value for key, value in kwargs.items() if key != "out"}]
        origin = self._origin(given, func)
        if origin is not None and origin.reason is not None:
            return origin
        # What is there already is changed, or what is elsewhere: it came from tensors that were written before.
        writers = tuple(self._writers[name]) if origin is None else origin.tensors
        if not writers:
            raise _refusal(what, parameter=name)
        return _Origin(writers, what)

    def _write_elsewhere(
        self, func: Any, target: torch.Tensor, origin: _Origin | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        changed = self._source_names.get(_storage(target))
        if changed is not None:
            self._mark(_Origin((changed,), f"the loader changes staged tensor {changed} by {func}"))
            return target
        where = "to memory that is no parameter"
        if origin is None and not target.is_meta:
            raise _refusal(f"the loader writes a constant by {func} {where}")
        if origin is None:
            return func(*args, **kwargs)
        if origin.reason is not None:
            origin = _Origin(origin.tensors, f"the loader writes {', '.join(origin.tensors)} by {func} {where}")
        self._mark(origin)
        self._derive(target, origin)
        return target

    def _value(self, func: Any, origin: _Origin, args: tuple[Any, ...]) -> bool | int | float:
        self.asked += origin.tensors
        self._asked_of_this += origin.tensors
        if func is not _VALUES[0] or args[0].dtype == torch.bool:
            return self._truth
        return (math.nan if self._truth else 0.0) if args[0].is_floating_point() else int(self._truth)

    def _comes_from_a_value(self, args: tuple[Any, ...]) -> bool:
        return bool(self._asked_of_this) or (len(args) > 1 and bool(self.asked) and math.isnan(args[1]))

    def _origin(self, values: object, func: Any) -> _Origin | None:
        """From which staged tensors these values come: directly, by way of other memory, or of a parameter."""
        staged: dict[str, None] = {}
        read_back: dict[str, None] = {}
        for value in tree_leaves(values):
            storage = _storage(value) if isinstance(value, torch.Tensor) else -1
            if storage in self._source_names:
                staged[self._source_names[storage]] = None
            elif storage in self._derived:
                derived = self._derived[storage]
                (read_back if derived.reason is None else staged).update(dict.fromkeys(derived.tensors))
            elif storage in self._parameter_names:
                read_back |= self._writers[self._parameter_names[storage]]
        if staged:
            reason = f"the loader computes with staged tensor {next(iter(staged))}: {func}"
            return _Origin((*staged, *(name for name in read_back if name not in staged)), reason)
        return _Origin(tuple(read_back), None) if read_back else None

    def _derive(self, made: torch.Tensor, origin: _Origin) -> None:
        before = self._derived.get(_storage(made), _Origin((), None))
        tensors = tuple(dict.fromkeys((*before.tensors, *origin.tensors)))
        self._derived[_storage(made)] = _Origin(tensors, before.reason or origin.reason)
        self._kept.append(made)

    def _mark(self, origin: _Origin) -> None:
        if origin.reason is not None:
            for tensor in origin.tensors:
                self.reasons.setdefault(tensor, origin.reason)

    def _add(self, write: Write, value: float | None = None) -> None:
        self.writes.append((write, value))
        if write.tensor is not None and write.target.volume:
            self._writers[write.parameter][write.tensor] = None


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
