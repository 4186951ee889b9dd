# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors that a model's loader computes with: that loader takes them itself, into live memory and no further.

It runs on a second copy of the model, as the plan's trace did. Nothing of this copy has memory but the parameters
that computed tensors end in, and their memory is the live one: its addresses stay, and nothing is held twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch

from stagingd.catalog import Catalog
from stagingd.errors import StagingError
from stagingd_vllm.layouts import Home
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor, Write
from stagingd_vllm.tracing import LoadWeights, trace_loader

_LOADER_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_REMEDY = "load it with vLLM's own loader"
_PLAIN = (bool, int, float, str)


class LoaderFailed(StagingError):
    """The model's own loader did not take the tensors of a version that only it can take."""

    code = "loader_failed"


@dataclass(frozen=True, slots=True)
class Loading:
    """How the engine loads the model.

    Attributes:
        build: makes the model of this worker once more, on the meta device.
        around: what the engine has around ``load_weights``.
    """

    build: Callable[[], torch.nn.Module]
    around: Callable[[], AbstractContextManager[object]]


class OwnLoader:
    """The model's own loader, for the computed tensors of a plan.

    What it holds besides the live memory: on the host one tensor of the stage at a time, whole, and those that the
    loader itself keeps until it has all that it needs.

    Args:
        plan: the worker's plan.
        live: where every parameter of the model lives.
        loading: how the engine loads; None where that is not known.
        catalog: the stage's.

    Raises:
        PlanRefused: the loader cannot write to one of these parameters where it lives, or a tensor is quantized
            already. Names tensor and parameter.
    """

    def __init__(self, plan: ReadPlan, live: Mapping[str, Home], loading: Loading | None, catalog: Catalog) -> None:
        self._catalog = catalog
        self._order = _order(plan)
        self._parameters = {tensor.tensor: tensor.parameters for tensor in plan.computed}
        self._loading = loading
        self._model: torch.nn.Module | None = None
        if not plan.computed:
            return
        if loading is None:
            raise _refused(plan, plan.computed[0].parameters[0], "no loader of the model is given to take it")
        _check_values(plan, catalog)
        self._model = loading.build()
        for name in plan.computed_parameters:
            for parameter in _in_the_memory_of(live[name], self._model, live):
                _check_fits(plan, name, live[name], parameter)
                _give_memory(parameter, live[name].weight)

    def load(self, slot: torch.Tensor) -> None:
        """Has the loader take the computed tensors of a version, each whole, in one call.

        Args:
            slot: the version's bytes, uint8.

        Raises:
            LoaderFailed: it raised, or did not ask for all of them. What it wrote before stays written.
        """
        if self._model is None or self._loading is None:
            return
        handed: list[str] = []

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self._order:
                handed.append(name)
                # A copy: the slot is mapped read-only, and a loader may change what it is given, or keep it.
                yield name, _whole(slot, self._catalog, tensor).clone()

        with self._loading.around(), torch.no_grad():
            try:
                cast(LoadWeights, self._model.load_weights)(weights())
            except _LOADER_ERRORS as error:
                raise self._failed(max(len(handed) - 1, 0), f"{type(error).__name__}: {error}") from error
        if len(handed) < len(self._order):
            raise self._failed(len(handed), "it never asked for it")

    def close(self) -> None:
        """Let the live memory go. May be called twice."""
        self._model = None

    def _failed(self, number: int, how: str) -> LoaderFailed:
        name, tensor = self._order[number]
        parameters = self._parameters[tensor]
        return LoaderFailed(
            f"the model's own loader did not take {name} of the stage into {', '.join(parameters)}: {how}",
            remedy="these weights hold no version until an update succeeds; if none does, " + _REMEDY,
            tensor=tensor,
            parameter=parameters[0],
        )


def check_alone(
    skeleton: torch.nn.Module,
    plan: ReadPlan,
    writes: Sequence[Write],
    owners: Mapping[str, str],
    staged: Mapping[str, StagedTensor],
    before: Mapping[tuple[str, str], object],
) -> None:
    """Checks that the computed tensors by themselves, version after version, become what they became in the trace.

    Args:
        skeleton: the model without memory that was traced.
        plan: what follows from the trace.
        writes: the trace, under the skeleton's names of parameters.
        owners: for every parameter, the name under which the plan knows it.
        staged: every tensor of the stage.
        before: the skeleton's ``attributes`` before the trace.

    Raises:
        PlanRefused: they would not, or the loader keeps something of them elsewhere than in these parameters.
    """
    apart = set(plan.computed_parameters)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    buffers = dict(skeleton.named_buffers(remove_duplicate=False))
    tensors = {tensor.tensor: staged[tensor.tensor] for tensor in plan.computed}
    aliases = {alias: name for alias, name in plan.aliases.items() if name in tensors}
    for parameter in {id(p): p for name, p in parameters.items() if owners[name] in apart}.values():
        # As it will be done with live memory: what writes by way of a view that was made before is then noticed.
        _give_memory(parameter, torch.empty_like(parameter))
    try:
        again = trace_loader(cast(LoadWeights, skeleton.load_weights), tensors, parameters | buffers, aliases)
    except PlanRefused as refused:
        raise PlanRefused(
            f"the model's own loader does not take computed tensors by themselves: {refused.what}",
            remedy=_REMEDY,
            **refused.context,
        ) from refused
    for write in again:
        if write.parameter not in parameters and write.tensor is not None:
            ends = next(tensor.parameters for tensor in plan.computed if tensor.tensor == write.tensor)
            raise _refused(plan, ends[0], f"the loader writes to buffer {write.parameter} too")
    _check_one_target_each(plan, owners, writes)
    first, second = (
        [dataclasses.replace(w, computed=None) for w in some if owners.get(w.parameter) in apart and w.target.volume]
        for some in (writes, again)
    )
    if first != second:
        differing = next((w for w in (*first, *second) if first.count(w) != second.count(w)), first[0])
        what = "the loader does otherwise with it when it gets such tensors alone, a second time, into other memory"
        raise _refused(plan, owners[differing.parameter], what)
    _check_keeps_nothing(skeleton, before)


def attributes(model: torch.nn.Module) -> dict[tuple[str, str], object]:
    """All that a model's modules hold by name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for held in (vars(module), module._parameters, module._buffers)
        for name, value in held.items()
    }


def _check_one_target_each(plan: ReadPlan, owners: Mapping[str, str], writes: Iterable[Write]) -> None:
    """Of two parameters that share live memory and are apart in the skeleton, it is not known which comes last."""
    written: dict[str, str] = {}
    for write in writes:
        owner = owners[write.parameter]
        if owner in plan.computed_parameters and write.tensor is not None and write.target.volume:
            other = written.setdefault(owner, write.parameter)
            if other != write.parameter:
                raise _refused(plan, owner, f"the loader writes {other} and {write.parameter}, which share one memory")


def _check_keeps_nothing(skeleton: torch.nn.Module, before: Mapping[tuple[str, str], object]) -> None:
    for (path, name), value in attributes(skeleton).items():
        where = f"{path}.{name}" if path else name
        earlier = before.get((path, name), before)
        if value is not earlier and not (isinstance(value, _PLAIN) and value == earlier):
            raise PlanRefused(
                f"the model's loader computes, and puts something into attribute {where}",
                remedy=_REMEDY,
            )


def _order(plan: ReadPlan) -> tuple[tuple[str, str], ...]:
    """Under which names the loader is given which tensors: all of them in the stage's order, and then the aliases."""
    tensors = [tensor.tensor for tensor in plan.computed]
    again = [(alias, name) for alias, name in plan.aliases.items() if name in tensors]
    return (*((name, name) for name in tensors), *again)


def _whole(slot: torch.Tensor, catalog: Catalog, name: str) -> torch.Tensor:
    tensor = catalog.tensor(name)
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return slot[tensor.offset : tensor.offset + tensor.bytes].view(dtype).view(tensor.shape)


def _in_the_memory_of(home: Home, model: torch.nn.Module, live: Mapping[str, Home]) -> list[torch.nn.Parameter]:
    """The parameters of the second copy whose live memory this is, each once."""
    parameters = model.named_parameters(remove_duplicate=False)
    named = [(live[name].weight, parameter) for name, parameter in parameters if name in live]
    there = [
        p for weight, p in named if weight.data_ptr() == home.weight.data_ptr() and weight.shape == home.weight.shape
    ]
    return list({id(parameter): parameter for parameter in there}.values())


def _check_values(plan: ReadPlan, catalog: Catalog) -> None:
    for computed in plan.computed:
        tensor = catalog.tensor(computed.tensor)
        if tensor.quantized_from is not None:
            raise PlanRefused(
                f"only the model's own loader can take {tensor.name}, which computes with values, and it is staged in "
                f"{catalog.format} ({computed.reason})",
                remedy=f"open the stage with {tensor.name} as {tensor.quantized_from}",
                tensor=tensor.name,
                parameter=computed.parameters[0],
            )


def _check_fits(plan: ReadPlan, name: str, home: Home, parameter: torch.Tensor) -> None:
    if home.scheme is not None:
        why = f"it lives as {home.scheme.name}, and no moments of the stage tell the scales of what is computed"
        raise _refused(plan, name, why, "serve this model unquantized, or " + _REMEDY)
    lives = home.weight.dtype, tuple(home.weight.shape), home.weight.stride()
    expected = parameter.dtype, tuple(parameter.shape), parameter.stride()
    if lives != expected:
        raise _refused(plan, name, f"it lives as {_layout(*lives)}, and the loader writes {_layout(*expected)}")


def _give_memory(parameter: torch.nn.Parameter, memory: torch.Tensor) -> None:
    """Puts live memory under a parameter that has none. The object stays: its loader may hold it."""
    fresh = torch.nn.Parameter(memory, requires_grad=False)
    fresh.__class__ = type(parameter)
    fresh.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, fresh)  # type: ignore[no-untyped-call]


def _layout(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> str:
    return f"{dtype} {shape} with strides {stride}"


def _refused(plan: ReadPlan, parameter: str, why: str, remedy: str = _REMEDY) -> PlanRefused:
    """That the tensors which end in a parameter cannot be loaded, with one of them: the one computed with, if any."""
    ending = [tensor for tensor in plan.computed if parameter in tensor.parameters]
    tensor = next((t for t in ending if not t.reason.startswith("it shares")), ending[0])
    return PlanRefused(
        f"only the model's own loader can take {tensor.tensor}, and it cannot be used for {parameter}: {why} "
        f"({tensor.reason})",
        remedy=remedy,
        tensor=tensor.tensor,
        parameter=parameter,
    )
