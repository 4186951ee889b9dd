# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Megatron's shards, named, are the Hugging Face tensors from which Megatron's were made, of any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from assembling import Assembly, numbered, part_of
from stagingd_client.megatron_names import MegatronNames, Place
from stagingd_client.placement import LocalShard, held
from stagingd_client.row_maps import Heads

from stagingd.errors import UnknownTensor, WrongShape

DIM, FFN, EXPERT_FFN, LAYERS, EXPERTS = 12, 16, 8, 2, 4
HEADS = Heads(queries=8, groups=4, rows=6)
VOCABULARY, PADDED = 21, 32
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What kind of model: with norms of queries and keys as Qwen3 has them, biases as Qwen2, experts, tied output."""

    qk_norm: bool = False
    bias: bool = False
    experts: bool = False
    tied: bool = False


SHAPES = {
    "llama": Shape(),
    "qwen2 tied": Shape(bias=True, tied=True),
    "qwen3": Shape(qk_norm=True),
    "qwen3 experts": Shape(qk_norm=True, experts=True),
}


def checkpoint(shape: Shape) -> Tensors:
    """A Hugging Face checkpoint, each element of which is another number."""
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, DIM), "model.norm.weight": (DIM,)}
    if not shape.tied:
        sizes["lm_head.weight"] = (VOCABULARY, DIM)
    rows = {"q": HEADS.queries * HEADS.rows, "k": HEADS.groups * HEADS.rows, "v": HEADS.groups * HEADS.rows}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        sizes[at + "self_attn.o_proj.weight"] = (DIM, rows["q"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[at + norm + ".weight"] = (DIM,)
        for which, count in rows.items():
            sizes[at + f"self_attn.{which}_proj.weight"] = (count, DIM)
            if shape.bias:
                sizes[at + f"self_attn.{which}_proj.bias"] = (count,)
            if shape.qk_norm and which != "v":
                sizes[at + f"self_attn.{which}_norm.weight"] = (HEADS.rows,)
        ffn = EXPERT_FFN if shape.experts else FFN
        for mlp in [f"mlp.experts.{e}." for e in range(EXPERTS)] if shape.experts else ["mlp."]:
            sizes |= {at + mlp + f"{which}_proj.weight": (ffn, DIM) for which in ("gate", "up")}
            sizes[at + mlp + "down_proj.weight"] = (DIM, ffn)
        if shape.experts:
            sizes[at + "mlp.gate.weight"] = (EXPERTS, DIM)
    found: Tensors = {}
    for name, size in sizes.items():
        found[name] = numbered(*size, first=sum(tensor.numel() for tensor in found.values()))
    return found


def of_rank(full: Tensors, shape: Shape, rank: int, ranks: int, experts: range, expert_rank: int, expert_ranks: int):
    """What Megatron loads into one rank of a checkpoint, by its own names; experts are counted from 0 on each rank."""

    def padded(name: str) -> torch.Tensor:
        return torch.cat([full[name], torch.full((PADDED - VOCABULARY, DIM), -1)]).chunk(ranks)[rank]

    def interleaved(at: str, place: int, places: int) -> torch.Tensor:
        return torch.cat([full[f"{at}{which}_proj.weight"].chunk(places)[place] for which in ("gate", "up")])

    yield "embedding.word_embeddings.weight", padded("model.embed_tokens.weight")
    yield "decoder.final_layernorm.weight", full["model.norm.weight"]
    if not shape.tied:
        yield "output_layer.weight", padded("lm_head.weight")
    for layer in range(LAYERS):
        at, to = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias") if shape.bias else ("weight",):
            heads = {w: full[f"{at}self_attn.{w}_proj.{kind}"].split(HEADS.rows) for w in "qkv"}
            stacked = []
            for group in range(HEADS.groups):
                stacked += [*heads["q"][2 * group : 2 * group + 2], heads["k"][group], heads["v"][group]]
            yield f"{to}self_attention.linear_qkv.{kind}", torch.cat(stacked).chunk(ranks)[rank]
        yield f"{to}self_attention.linear_proj.weight", full[at + "self_attn.o_proj.weight"].chunk(ranks, 1)[rank]
        yield f"{to}self_attention.linear_qkv.layer_norm_weight", full[at + "input_layernorm.weight"]
        if shape.qk_norm:
            for which in "qk":
                yield f"{to}self_attention.{which}_layernorm.weight", full[f"{at}self_attn.{which}_norm.weight"]
        norm = full[at + "post_attention_layernorm.weight"]
        if shape.experts:
            yield f"{to}pre_mlp_layernorm.weight", norm
            yield f"{to}mlp.router.weight", full[at + "mlp.gate.weight"]
            for local, expert in enumerate(experts):
                mlp = f"{at}mlp.experts.{expert}."
                down = full[mlp + "down_proj.weight"].chunk(expert_ranks, 1)[expert_rank]
                yield f"{to}mlp.experts.linear_fc1.weight{local}", interleaved(mlp, expert_rank, expert_ranks)
                yield f"{to}mlp.experts.linear_fc2.weight{local}", down
        else:
            yield f"{to}mlp.linear_fc1.layer_norm_weight", norm
            yield f"{to}mlp.linear_fc1.weight", interleaved(at + "mlp.", rank, ranks)
            yield f"{to}mlp.linear_fc2.weight", full[at + "mlp.down_proj.weight"].chunk(ranks, 1)[rank]


def cut(shard: LocalShard, rows: int) -> Iterator[LocalShard]:
    """The shard as a distributed optimizer might split it: this many rows at a time."""
    shape = shard.global_shape or tuple(shard.tensor.shape)
    offset = shard.offset or (0,) * len(shape)
    for first, part in enumerate(shard.tensor.split(rows)):
        yield LocalShard(part, shape, (offset[0] + first * rows, *offset[1:]))


@pytest.mark.parametrize("rows", [1000, 5])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shards_of_all_ranks_are_the_checkpoint(shape: str, ranks: int, rows: int) -> None:
    full = checkpoint(SHAPES[shape])
    assembly = Assembly()
    for rank in range(ranks):
        # Of 4 ranks, 2 hold each the experts of one half, in two parts: expert parallel 2 x expert tensor parallel 2.
        halves = 2 if ranks == 4 else 1
        place = Place(rank % (ranks // halves), ranks // halves)
        first = rank // (ranks // halves) * (EXPERTS // halves)
        mine = range(first, first + EXPERTS // halves)
        names = MegatronNames(HEADS, VOCABULARY, Place(rank, ranks), place, first_expert=first, tied=SHAPES[shape].tied)
        for name, tensor in of_rank(full, SHAPES[shape], rank, ranks, mine, place.rank, place.ranks):
            shard = names.local_shard(name, tensor)
            if shard.global_shape is None and rank and ".experts." not in name:
                continue  # a replica, which one rank gives
            for piece in cut(shard, rows):
                part = held(name, piece)
                assert part is not None
                assembly.add(names.shards(name, part), part)
    found = assembly.tensors
    assert found.keys() == full.keys()
    for name, tensor in full.items():
        assert torch.equal(found[name], tensor), name


def names_of(**changes: object) -> MegatronNames:
    return MegatronNames(HEADS, VOCABULARY, **changes)  # type: ignore[arg-type]


def test_a_ranks_fused_tensor_is_one_view_per_hugging_face_tensor() -> None:
    names = names_of(tensor_parallel=Place(1, 2))
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    part = held(name, names.local_shard(name, numbered(HEADS.fused_rows // 2, DIM)))
    assert part is not None
    assert [tuple(shard.part.values.shape) for shard in names.shards(name, part)] == [
        (2, 12, DIM),
        (2, 6, DIM),
        (2, 6, DIM),
    ]
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    part = held(name, names.local_shard(name, numbered(FFN, DIM)))
    assert part is not None
    gate, up = names.shards(name, part)
    assert (gate.name, up.name) == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert gate.part.box == up.part.box
    assert gate.part.box.offsets == (FFN // 2, 0)


def test_layers_of_a_later_pipeline_stage_and_wrapped_names_are_numbered_on() -> None:
    names = names_of(first_layer=16, first_expert=4)
    (shard,) = names.shards("module.module.decoder.layers.3.mlp.router.weight", part_of(numbered(EXPERTS, DIM)))
    assert shard.name == "model.layers.19.mlp.gate.weight"
    fc2 = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"
    (shard,) = names.shards(fc2, part_of(numbered(DIM, EXPERT_FFN)))
    assert shard.name == "model.layers.16.mlp.experts.5.down_proj.weight"
    fc1 = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    assert [shard.name for shard in names.shards(fc1, part_of(numbered(2 * EXPERT_FFN, DIM)))] == [
        f"model.layers.16.mlp.experts.5.{which}_proj.weight" for which in ("gate", "up")
    ]


def test_a_shard_that_is_all_padding_is_no_shard() -> None:
    names = names_of(tensor_parallel=Place(3, 4))
    name = "embedding.word_embeddings.weight"
    part = held(name, names.local_shard(name, numbered(PADDED // 4, DIM)))
    assert part is not None
    assert names.shards(name, part) == ()


def test_a_tied_output_is_an_alias_and_its_copy_on_the_last_stage_is_skipped() -> None:
    tied, own = names_of(tied=True), names_of()
    assert tied.aliases() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert own.aliases() == {}
    assert tied.skips("module.output_layer.weight")
    assert not own.skips("output_layer.weight")
    assert not tied.skips("embedding.word_embeddings.weight")
    assert own.skips("decoder.layers.0.mlp.router.local_tokens_per_expert")
    assert own.skips("decoder.layers.0.self_attention.core_attention._extra_state")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    part = part_of(numbered(4, 4))
    with pytest.raises(UnknownTensor, match=r"nearest names are decoder\.layers\.7\.self_attention\.linear_proj"):
        names_of().shards("decoder.layers.7.self_attention.linear_prj.weight", part)
    with pytest.raises(UnknownTensor, match=r"decoder\.final_layernorm\.weight"):
        names_of().shards("decoder.final_norm.weight", part)
    with pytest.raises(UnknownTensor, match=r"decoder\.layers\.0\.mlp\.experts\.linear_fc1\.weight0"):
        names_of().shards("decoder.layers.0.mlp.experts.weight1", part)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.weight", HEADS.fused_rows // 2),
        ("decoder.layers.0.mlp.linear_fc1.weight", 14),
        ("embedding.word_embeddings.weight", VOCABULARY - 1),
    ],
)
def test_a_shard_of_another_model_or_without_its_global_shape_is_refused(name: str, rows: int) -> None:
    with pytest.raises(WrongShape, match=f"has {rows} rows in all"):
        names_of(tensor_parallel=Place(0, 4)).shards(name, part_of(numbered(rows, DIM)))
