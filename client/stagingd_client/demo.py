# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's trainer: FSDP2 over gloo, a small Qwen3-shaped model, real optimizer steps.

``stagingd demo`` starts one process per rank. They train without a pause; whenever one more version is
wanted, the next step is published, and rank 0 saves the same parameters as a full checkpoint, from
which the engine's own loader makes what the staged version is compared with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from stagingd_client.publication import Publication
from stagingd_client.stage import Stage

STEP_LIMIT = 100_000
"""The demo ends long before; a run that nobody stops ends here."""


def model_config() -> Qwen3Config:
    """Grouped-query attention; a vocabulary and an intermediate size that divide by neither 3 nor 128."""
    return Qwen3Config(
        vocab_size=1021,
        hidden_size=256,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_model(folder: Path, rank: int) -> Qwen3ForCausalLM:
    """The model before training, the same on every rank; rank 0 saves it for the engine to start from."""
    torch.manual_seed(20)
    model = Qwen3ForCausalLM(model_config())
    if rank == 0:
        model.to(torch.bfloat16).save_pretrained(folder / "model.part")
        (folder / "model.part").rename(folder / "model")
    dist.barrier()
    model = model.float()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
    return model


def save_checkpoint(model: torch.nn.Module, version: int, folder: Path) -> None:
    """Gather the whole model, as trainers without stagingd do for every update, and save it in bf16."""
    full = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().to(torch.bfloat16)
        for name, p in model.named_parameters()
    }
    if dist.get_rank() == 0:
        part = folder / f"checkpoint-{version}.part"
        Qwen3ForCausalLM(model_config()).to(torch.bfloat16).save_pretrained(part, state_dict=full)
        part.rename(folder / f"checkpoint-{version}")


def wanted(folder: Path) -> tuple[int, bool]:
    """How many versions are wanted in all, and whether to stop: rank 0 looks, all ranks do the same."""
    answer = torch.zeros(2, dtype=torch.int64)
    if dist.get_rank() == 0:
        request = folder / "wanted"
        answer[0] = int(request.read_text()) if request.exists() else 0
        answer[1] = int((folder / "stop").exists())
    dist.broadcast(answer, 0)
    return int(answer[0]), bool(answer[1])


def train(folder: Path, stage: Stage, model: torch.nn.Module, report: Path) -> None:
    """Train and publish until told to stop. Per version one line of JSON says how long the trainer was held up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    published, publication = 0, None
    line: dict[str, float] = {}
    for step in itertools.islice(itertools.count(1), STEP_LIMIT):
        tokens = torch.randint(0, model_config().vocab_size, (2, 32), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        start = time.perf_counter()
        stage.fence()
        line |= {"fence_ms": (time.perf_counter() - start) * 1e3, "step": step}
        if publication is not None:
            finish(model, publication, line, folder, report)
            publication, line = None, {}
        optimizer.step()
        optimizer.zero_grad()
        count, stop = wanted(folder)
        if stop:
            return
        if published < count:
            published += 1
            start = time.perf_counter()
            publication = stage.publish(step, model)
            line["publish_ms"] = (time.perf_counter() - start) * 1e3


def finish(
    model: torch.nn.Module, publication: Publication, line: dict[str, float], folder: Path, report: Path
) -> None:
    """After the fence and before the optimizer: the parameters are still those of the published version."""
    publication.wait()
    save_checkpoint(model, publication.version, folder)
    with report.open("a") as lines:
        lines.write(json.dumps({"version": publication.version, **line}) + "\n")


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.nice(10)  # training fills every core that it gets; the engine shall have its share of two
    dist.init_process_group(
        "gloo", init_method=f"file://{given.folder}/rendezvous", rank=given.rank, world_size=given.ranks
    )
    try:
        model = make_model(given.folder, given.rank)
        with Stage.open(given.stage, socket=given.socket) as stage:
            stage.declare(model)
            train(given.folder, stage, model, given.folder / f"trainer-{given.rank}.jsonl")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
