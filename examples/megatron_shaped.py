# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A trainer with Megatron-Core's parameters: plain tensors, one tensor-parallel rank's part each, some fused.

    stagingd serve &
    torchrun --nproc_per_node=2 examples/megatron_shaped.py

Megatron is not needed here. With it, take ranks from ``parallel_state`` and tensors from ``named_parameters``.
"""

import torch
import torch.distributed as dist
from arrived import check_arrived
from stagingd_client import Stage
from stagingd_client.megatron_names import Heads, MegatronNames, Place

STEPS, HIDDEN, INTERMEDIATE, VOCABULARY, PADDED = 3, 64, 96, 500, 512
HEADS = Heads(queries=8, groups=4, rows=16)
LAYER = "decoder.layers.0."


def make_parameters(ranks: int) -> dict[str, torch.Tensor]:
    """One layer, as a rank of Megatron-Core has it."""
    torch.manual_seed(dist.get_rank())
    shapes = {
        "embedding.word_embeddings.weight": (PADDED // ranks, HIDDEN),
        f"{LAYER}self_attention.linear_qkv.weight": (HEADS.fused_rows // ranks, HIDDEN),
        f"{LAYER}self_attention.linear_proj.weight": (HIDDEN, HEADS.queries * HEADS.rows // ranks),
        f"{LAYER}mlp.linear_fc1.weight": (2 * INTERMEDIATE // ranks, HIDDEN),
        f"{LAYER}mlp.linear_fc2.weight": (HIDDEN, INTERMEDIATE // ranks),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def checkpoint(parameters: dict[str, torch.Tensor], ranks: int) -> dict[str, torch.Tensor]:
    """The whole model by Hugging Face names, as one would gather it without stagingd; for the check only."""
    parts = [[torch.empty_like(tensor) for _ in range(ranks)] for tensor in parameters.values()]
    for tensor, there in zip(parameters.values(), parts, strict=True):
        dist.all_gather(there, tensor)
    embedding, qkv, projection, gate_up, down = parts
    groups = torch.cat(qkv).view(HEADS.groups, -1, HEADS.rows, HIDDEN)
    layer = {
        "self_attn.q_proj.weight": groups[:, :-2].reshape(-1, HIDDEN),
        "self_attn.k_proj.weight": groups[:, -2].reshape(-1, HIDDEN),
        "self_attn.v_proj.weight": groups[:, -1].reshape(-1, HIDDEN),
        "self_attn.o_proj.weight": torch.cat(projection, dim=1),
        "mlp.gate_proj.weight": torch.cat([part.chunk(2)[0] for part in gate_up]),
        "mlp.up_proj.weight": torch.cat([part.chunk(2)[1] for part in gate_up]),
        "mlp.down_proj.weight": torch.cat(down, dim=1),
    }
    whole = {f"model.layers.0.{name}": tensor for name, tensor in layer.items()}
    return whole | {"model.embed_tokens.weight": torch.cat(embedding)[:VOCABULARY]}


def main() -> None:
    """One rank."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    names = MegatronNames(HEADS, VOCABULARY, tensor_parallel=Place(rank, ranks))
    parameters = make_parameters(ranks)
    with Stage.open("megatron-example", names=names) as stage:
        stage.declare({name: names.local_shard(name, tensor) for name, tensor in parameters.items()})
        for step in range(1, STEPS + 1):
            stage.fence()  # from here on the parameters may change
            for tensor in parameters.values():
                tensor.mul_(0.9)  # an optimizer's step
            stage.begin(step)
            for name, tensor in parameters.items():
                stage.put(name, names.local_shard(name, tensor))
            publication = stage.commit()  # returns at once
        publication.wait()  # only for the check below: engines need no word from the trainer
        whole = checkpoint(parameters, ranks)
        if rank == 0:
            check_arrived("megatron-example", STEPS, whole)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
