# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's names and row orders: Llama- and Qwen3-shaped models, dense or with experts.

Megatron's parameters are plain tensors that do not say what they are part of, so a trainer says it::

    names = MegatronNames(Heads(queries=32, groups=8, rows=128), vocab_size=128256, tensor_parallel=Place(rank, 4))
    for name, parameter in model.named_parameters():
        shard = names.local_shard(name, parameter)     # with its global shape and offset
        ...
        names.shards(name, held(name, shard))          # what it is of the Hugging Face tensors
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from stagingd.errors import WrongShape
from stagingd_client.naming import NamedShard, unknown
from stagingd_client.placement import Held, LocalShard
from stagingd_client.row_maps import Heads, fused_qkv, gate_up, trimmed

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_VOCABULARY = {_EMBEDDING: "model.embed_tokens.weight", _OUTPUT: "lm_head.weight"}
_NORM = {"decoder.final_layernorm.weight": "model.norm.weight"}
_RENAMED = {  # within a layer; a norm is of its own, or of the layer that Transformer Engine fused it with
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_QKV = {"self_attention.linear_qkv.weight": "weight", "self_attention.linear_qkv.bias": "bias"}
_GATE_UP = "mlp.linear_fc1.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?:linear_(fc[12])\.weight(\d+)|local_experts\.(\d+)\.linear_(fc[12])\.weight)")
_ROWS_SPLIT = re.compile(
    r"linear_qkv\.(?:weight|bias)|linear_fc1\.weight\d*|word_embeddings\.weight|output_layer\.weight"
)
_COLUMNS_SPLIT = re.compile(r"linear_proj\.weight|linear_fc2\.weight\d*")
_TRANSIENT = frozenset({"_extra_state", "local_tokens_per_expert", "inv_freq"})


@dataclass(frozen=True)
class Place:
    """A rank's place in a parallel group: its rank there, and the group's size."""

    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class MegatronNames:
    """How a Megatron-Core model names its tensors and orders their rows.

    Attributes:
        heads: those of a layer; ``rows`` is ``kv_channels``.
        vocab_size: rows of the embedding without the padding that Megatron adds; the padding is not staged.
        tensor_parallel: this rank's place in the tensor-parallel group:
            ``Place(mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size())``. The size
            says how ``linear_fc1`` is interleaved, so give it with shards of your own making too.
        expert_tensor_parallel: the same for the experts' weights (``mpu.get_expert_tensor_parallel_rank()``, ...).
        first_layer: number of this pipeline stage's first layer, where its names count from 0.
        first_expert: number of this rank's first expert, where its names count from 0.
        tied: whether embedding and output share their weight; it is staged once, as the embedding.
    """

    heads: Heads
    vocab_size: int
    tensor_parallel: Place = Place()
    expert_tensor_parallel: Place = Place()
    first_layer: int = 0
    first_expert: int = 0
    tied: bool = False

    def local_shard(self, name: str, tensor: torch.Tensor) -> LocalShard:
        """Say what a rank's parameter is part of.

        Ranks' tensors are stacked in their order: by rows for ``linear_qkv``, ``linear_fc1``, embedding and output,
        by columns for ``linear_proj`` and ``linear_fc2``; all others are whole. The name decides: for experts the
        attribute ``partition_dim`` is not to be trusted.

        Args:
            name: the parameter's name in the model.
            tensor: what this rank has of it.
        """
        place = self.expert_tensor_parallel if ".experts." in name else self.tensor_parallel
        dim = 0 if _ends(_ROWS_SPLIT, name) else 1 if _ends(_COLUMNS_SPLIT, name) else None
        if dim is None or place.ranks == 1:
            return LocalShard(tensor)
        shape, offset = list(tensor.shape), [0] * tensor.dim()
        offset[dim] = place.rank * shape[dim]
        shape[dim] *= place.ranks
        return LocalShard(tensor, tuple(shape), tuple(offset))

    def skips(self, name: str) -> bool:
        """Whether a tensor is not staged: counters, extra state, and the output where it is tied."""
        return name.rpartition(".")[2] in _TRANSIENT or (self.tied and _bare(name) == _OUTPUT)

    def aliases(self) -> Mapping[str, str]:
        """The output's name, where it shares its weight with the embedding."""
        return {_VOCABULARY[_OUTPUT]: _VOCABULARY[_EMBEDDING]} if self.tied else {}

    def shards(self, name: str, part: Held) -> tuple[NamedShard, ...]:
        """The Hugging Face tensors of which a shard holds a part.

        Args:
            name: the parameter's name; a leading ``module.`` of a wrapper is of no account.
            part: what this rank holds of it: as ``local_shard`` says, or any box of the stacked tensor.

        Returns:
            Views of ``part.values``, without the padding of the vocabulary: where a shard is all padding, none.

        Raises:
            UnknownTensor: it has no Hugging Face name; the message lists the nearest.
            WrongShape: the tensor does not have the rows that the heads, the vocabulary or the ranks need.
        """
        bare = _bare(name)
        if bare in _NORM:
            return (NamedShard(_NORM[bare], part),)
        if bare in _VOCABULARY:
            _check(name, part, part.global_shape[0] >= self.vocab_size, f"the vocabulary has {self.vocab_size} rows")
            return tuple(NamedShard(_VOCABULARY[bare], piece) for piece in trimmed(part, self.vocab_size))
        found = _LAYER.fullmatch(bare)
        if found is None:
            raise self._unknown(name, "decoder.layers.0.")
        layer = f"model.layers.{int(found[1]) + self.first_layer}."
        return tuple(NamedShard(layer + rest, piece) for rest, piece in self._in_layer(name, found[2], part))

    def _in_layer(self, name: str, rest: str, part: Held) -> Iterator[tuple[str, Held]]:
        """Names within a layer, and the parts of their tensors."""
        expert = _EXPERT.fullmatch(rest)
        if rest in _RENAMED:
            yield _RENAMED[rest], part
        elif rest in _QKV:
            _check(name, part, part.global_shape[0] == self.heads.fused_rows, f"{self.heads} make another number")
            for which, piece in fused_qkv(part, self.heads):
                yield f"self_attn.{which}_proj.{_QKV[rest]}", piece
        elif rest == _GATE_UP:
            yield from _gate_up(name, "mlp", part, self.tensor_parallel.ranks)
        elif expert is not None:
            number = int(expert[2] or expert[3]) + self.first_expert
            if (expert[1] or expert[4]) == "fc1":
                yield from _gate_up(name, f"mlp.experts.{number}", part, self.expert_tensor_parallel.ranks)
            else:
                yield f"mlp.experts.{number}.down_proj.weight", part
        else:
            raise self._unknown(name, _bare(name).removesuffix(rest))

    def _unknown(self, name: str, layer: str) -> Exception:
        experts = [f"mlp.experts.linear_{which}.weight0" for which in ("fc1", "fc2")]
        known = [layer + rest for rest in (*_RENAMED, *_QKV, _GATE_UP, *experts)]
        return unknown(name, [*_VOCABULARY, *_NORM, *known], of="a model of Llama's or Qwen3's shape")


def _bare(name: str) -> str:
    """A name without the wrappers, such as data parallelism, that the model is in."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _ends(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(".".join(name.split(".")[-2:])) is not None


def _gate_up(name: str, prefix: str, part: Held, ranks: int) -> Iterator[tuple[str, Held]]:
    _check(name, part, part.global_shape[0] % (2 * ranks) == 0, f"{ranks} ranks have gate and up each")
    for which, piece in gate_up(part, ranks):
        yield f"{prefix}.{which}_proj.weight", piece


def _check(name: str, part: Held, right: bool, wanted: str) -> None:
    if not right:
        raise WrongShape(
            f"tensor {name!r} has {part.global_shape[0]} rows in all, but {wanted}",
            remedy="give the heads, vocabulary and tensor-parallel size of this model, and the tensor's global shape",
            tensor=name,
        )
