# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The read plan of any worker of any engine, made on a CPU with no engine, no other process and no weights.

vLLM keeps its process groups and much else in globals: use this in a process of its own, never in an engine's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.models import utils as models_utils

from stagingd.errors import StagingError
from stagingd_vllm.plan import ReadPlan, StagedTensor, plan_with_aliases
from stagingd_vllm.skeleton import build_skeleton, plan_of_skeleton


class NoSuchWorker(StagingError):
    """A rank that an engine of this size does not have, or an engine that vLLM would not start."""

    code = "no_such_worker"


@dataclasses.dataclass(frozen=True, slots=True)
class Worker:
    """One worker: the sizes of its engine, and its rank among the engine's workers.

    Tensor-parallel ranks count fastest, as in vLLM. With ``expert_parallel`` the tensor-parallel ranks of a stage
    hold whole experts instead of a part of each.

    Raises:
        NoSuchWorker: a size is less than 1, or the rank is not below their product.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1 or self.pipeline_parallel < 1 or not 0 <= self.rank < self.ranks:
            raise NoSuchWorker(
                f"there is no rank {self.rank} of tensor-parallel {self.tensor_parallel} "
                f"x pipeline-parallel {self.pipeline_parallel}",
                remedy="count ranks from 0 to the product of the two sizes",
                rank=self.rank,
            )

    @property
    def ranks(self) -> int:
        """Number of workers of the engine."""
        return self.tensor_parallel * self.pipeline_parallel


@contextlib.contextmanager
def worker_config(
    directory: Path, worker: Worker, dtype: str = "bfloat16", quantization: str | None = None
) -> Iterator[VllmConfig]:
    """vLLM's configuration for a worker that runs the model in ``directory``, current and with its process groups.

    Args:
        directory: a Hugging Face model's folder; only its configuration is read.
        worker: which worker of which engine.
        dtype: of the model's parameters.
        quantization: vLLM's name of it; a plan does not depend on it.

    Raises:
        NoSuchWorker: vLLM does not run this model, or not on an engine of this size. Tells vLLM's own words.
    """
    arguments = EngineArgs(
        model=str(directory),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=dtype,
        quantization=quantization,
        enforce_eager=True,
        max_model_len=16,
        block_size=16,
        tensor_parallel_size=worker.tensor_parallel,
        pipeline_parallel_size=worker.pipeline_parallel,
        enable_expert_parallel=worker.expert_parallel,
        distributed_executor_backend="mp",
    )
    try:
        config = arguments.create_engine_config()
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise NoSuchWorker(
            f"vLLM would not start an engine with {worker}: {error}", remedy="choose other sizes, or another model"
        ) from error
    with set_current_vllm_config(config), fake_process_groups(worker), expert_kernels_of_a_gpu():
        yield config


@contextlib.contextmanager
def fake_process_groups(worker: Worker) -> Iterator[None]:
    """Lets this one process be any worker of an engine, as far as building a model asks.

    What is replaced, and why:

    - torch's process groups, all of them by the "fake" backend: it knows ranks and sizes and talks to nobody.
      vLLM asks for gloo beside its device's backend, which would wait for the other ranks.
    - vLLM's search for ranks on the same node, which broadcasts: all ranks are said to be on this one.
    - the message queue and the device communicator of vLLM's groups, which meet the other ranks when they are made.

    A current vLLM configuration has to be set. At the end the groups are gone, and with them what vLLM remembers of
    the layers that a model lacks (by the model's identity, which the next model can have again): another worker can
    follow.
    """
    new_group = torch.distributed.new_group
    make_coordinator = parallel_state.GroupCoordinator.__init__

    def fake_group(ranks: Any = None, *_: object, **__: object) -> Any:
        return new_group(ranks, backend="fake")

    def coordinator(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"use_message_queue_broadcaster": False, "use_device_communicator": False}
        make_coordinator(self, *args, **kwargs)

    def one_node(*_: object, **__: object) -> list[bool]:
        return [True] * worker.ranks

    torch.distributed.init_process_group("fake", rank=worker.rank, world_size=worker.ranks, store=FakeStore())
    try:
        with (
            _replaced(torch.distributed, "new_group", fake_group),
            _replaced(parallel_state, "in_the_same_node_as", one_node),
            _replaced(parallel_state.GroupCoordinator, "__init__", coordinator),
        ):
            parallel_state.init_distributed_environment(worker.ranks, worker.rank, "env://", worker.rank, "fake")
            parallel_state.initialize_model_parallel(worker.tensor_parallel, worker.pipeline_parallel)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        models_utils._model_to_pp_missing_layer_names.clear()


@contextlib.contextmanager
def expert_kernels_of_a_gpu() -> Iterator[None]:
    """Lets layers with experts be built whose kernels the CPU does not have.

    vLLM chooses the kernel when it makes the layer, and refuses sizes and expert parallelism that the platform's
    kernels cannot do. Here it chooses the Triton kernel, which takes the parameters as they are.
    """

    def triton(*_: object, **__: object) -> tuple[object, object]:
        backend = unquantized.UnquantizedMoeBackend.TRITON
        return backend, unquantized.backend_to_kernel_cls(backend)[0]

    with _replaced(unquantized_fused_moe_method, "select_unquantized_moe_backend", triton):
        yield


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def derive_offline(
    config: VllmConfig, staged: Mapping[str, StagedTensor], staged_aliases: Mapping[str, str]
) -> ReadPlan:
    """The read plan of the worker whose configuration is current.

    Tensors that the model's loader computes with are set apart, not refused.

    Args:
        config: what ``worker_config`` gives, inside its context.
        staged: every tensor of the stage by its Hugging Face name.
        staged_aliases: further names of these tensors, each with the tensor's own.

    Raises:
        PlanRefused: the stage does not fit the model, or the model is of a kind that is not understood.
    """
    return plan_with_aliases(lambda names: _derive(config, staged, names), staged_aliases)


def _derive(config: VllmConfig, staged: Mapping[str, StagedTensor], staged_aliases: Mapping[str, str]) -> ReadPlan:
    skeleton = build_skeleton(config)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(parameter), name) for name, parameter in parameters.items()}
    return plan_of_skeleton(skeleton, owners, staged, staged_aliases)
