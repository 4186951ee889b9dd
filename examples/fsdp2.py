# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Plain FSDP2: every rank stages its own shards after every step, and nobody gathers anything.

    stagingd serve &
    torchrun --nproc_per_node=2 examples/fsdp2.py

It runs on GPUs where there are enough, else on CPU over gloo.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from arrived import check_arrived
from stagingd_client import Stage
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

STEPS = 3


def make_model(device: torch.device) -> nn.Module:
    """Three blocks, each sharded over all ranks."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(96, 250), nn.GELU(), nn.Linear(250, 96)) for _ in range(3)]
    model = nn.Sequential(*blocks).to(device)
    for module in (*blocks, model):
        fully_shard(module)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
    return model


def main() -> None:
    """One rank."""
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= local_ranks
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    with Stage.open("fsdp2-example") as stage:
        stage.fence_before(optimizer)  # a step waits until its predecessor's weights are copied
        for step in range(1, STEPS + 1):
            batch = torch.randn(8, 96, device=device)
            nn.functional.mse_loss(model(batch), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            publication = stage.publish(step, model)  # returns at once
        publication.wait()  # only for the check below: engines need no word from the trainer

        full = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}  # for the check, too
        if dist.get_rank() == 0:
            check_arrived("fsdp2-example", STEPS, full)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
