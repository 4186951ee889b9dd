# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan's names and row orders, version 0.2 and 0.3: Llama 3, Qwen3 dense and with experts, DeepSeek V3.

What is only another name is read from the model's own state dict adapter. What is more than a name, an
adapter does to full tensors; here it is done to one rank's shard, and gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stagingd.errors import UnknownModel, WrongShape
from stagingd_client.naming import NamedShard, unknown
from stagingd_client.placement import Held
from stagingd_client.row_maps import Heads, experts, fused_qkv, rotary

_FUSED = re.compile(r"(.*\.qkv_linear\.)wqkv(\..+)")  # split into wq, wk and wv, of which the adapter has the names
_LAYER = re.compile(r"(mtp_layers|layers)\.(\d+)\.(.+)")
_OUTPUTS = ("output.weight", "lm_head.weight")  # of 0.2, of 0.3
_TRANSIENT = frozenset({"tokens_per_expert", "tokens_per_expert_E", "freqs_cis", "rope_cache"})


@dataclass(frozen=True)
class _Family:
    """What a family's adapter does besides renaming, splitting fused q|k|v, and splitting experts.

    Attributes:
        rotary: names, without their layer, of the tensors whose rows it brings from rotary pairs to halves.
        dropped: tensors that it leaves out, since the family's checkpoints have no place for them.
    """

    rotary: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()


# By the class whose to_hf is used: a subclass that has its own may do anything.
_FAMILIES = {
    "Llama3StateDictAdapter": _Family(
        rotary=frozenset(
            f"attention.{prefix}{which}.weight" for prefix in ("", "qkv_linear.") for which in ("wq", "wk")
        )
    ),
    "Qwen3StateDictAdapter": _Family(dropped=frozenset({"moe.expert_bias", "moe.expert_bias_E"})),
    "DeepSeekV3StateDictAdapter": _Family(),
}


class TorchTitanNames:
    """How a TorchTitan model names its tensors and orders their rows. Use ``TorchTitanNames.of``."""

    def __init__(self, family: _Family, table: Mapping[str, str], heads: Heads, layers: int, tied: bool) -> None:
        self._family = family
        self._table = table
        self._heads = heads
        self._layers = layers
        self._tied = tied

    @classmethod
    def of(cls, adapter: Any) -> TorchTitanNames:
        """The names of the model that a state dict adapter is for.

        Args:
            adapter: the model's own, as in ``train_spec.state_dict_adapter(model_args, None)``.

        Raises:
            UnknownModel: it is of no family that is known here.
        """
        owner = getattr(type(adapter).to_hf, "__qualname__", "").split(".")[0]
        family = _FAMILIES.get(owner)
        if family is None:
            raise UnknownModel(
                f"the adapter {type(adapter).__module__}.{type(adapter).__qualname__} converts by {owner or 'nothing'}",
                remedy=f"use a model whose adapter converts by one of {', '.join(_FAMILIES)}, "
                "or give Hugging Face names and shards yourself",
            )
        table = {native: name for name, native in adapter.from_hf_map.items() if native is not None}
        config = getattr(adapter, "model_args", None) or adapter.model_config
        heads, layers = _shape(config)
        return cls(family, table, heads, layers, tied=getattr(config, "enable_weight_tying", False))

    def skips(self, name: str) -> bool:
        """Whether a tensor is not staged: counters, rotary caches, the output where it is tied, a bias of no family."""
        rest = _plain(name)
        return (
            rest.rpartition(".")[2] in _TRANSIENT
            or rest in self._family.dropped
            or (self._tied and name in _OUTPUTS)
            or name.endswith("rope.cache")
        )

    def aliases(self) -> Mapping[str, str]:
        """The output's name, where it shares its weight with the embedding."""
        outputs = [self._table[name] for name in _OUTPUTS if name in self._table]
        return dict.fromkeys(outputs, self._table["tok_embeddings.weight"]) if self._tied else {}

    def shards(self, name: str, part: Held) -> tuple[NamedShard, ...]:
        """The Hugging Face tensors of which a shard holds a part.

        Args:
            name: the name that the tensor has in ``Modules`` of the model.
            part: what this rank holds of it.

        Returns:
            Views of ``part.values``: one, or one per expert, or one per fused tensor; a few more for each place
            where the shard is cut inside a head.

        Raises:
            UnknownTensor: the adapter has no name for it; the message lists the nearest.
            WrongShape: the tensor does not have the dims or the rows that the model's arguments say.
        """
        fused = _FUSED.fullmatch(name)
        if fused is None or self._find(f"{fused[1]}wq{fused[2]}") is None:
            return tuple(self._named(name, part))
        self._check_rows(name, part, self._heads.fused_rows)
        before, after = fused.groups()
        pieces = fused_qkv(part, self._heads)
        return tuple(shard for which, piece in pieces for shard in self._named(f"{before}w{which}{after}", piece))

    def _named(self, name: str, part: Held) -> Iterator[NamedShard]:
        """The shards of a tensor that is not fused, of which an adapter has the name."""
        template, layer = self._template(name)
        if template.count("{}") > 1:
            if len(part.global_shape) != 3:
                raise _wrong(name, part, "grouped experts have 3 dims")
            for expert, piece in experts(part):
                yield NamedShard(template.format(layer, expert), piece)
        elif _plain(name) in self._family.rotary:
            heads = self._heads.queries if _plain(name).endswith("wq.weight") else self._heads.groups
            self._check_rows(name, part, heads * self._heads.rows)
            for piece in rotary(part, self._heads.rows):
                yield NamedShard(template.format(layer), piece)
        else:
            yield NamedShard(template.format(layer), part)

    def _template(self, name: str) -> tuple[str, int]:
        """The Hugging Face name with places for numbers, and the layer's number there. Raises UnknownTensor."""
        template = self._find(name)
        found = _LAYER.fullmatch(name)
        stack, layer = (found[1], int(found[2])) if found else ("layers", 0)
        if template is None:
            known = (native.replace("layers.{}.", f"{stack}.{layer}.") for native in self._table)
            raise unknown(name, known, of="the model's adapter")
        # Layers that predict further tokens are counted on from the others.
        return template, layer + (self._layers if stack == "mtp_layers" else 0)

    def _find(self, name: str) -> str | None:
        return self._table.get(f"layers.{{}}.{_plain(name)}" if _LAYER.fullmatch(name) else name)

    def _check_rows(self, name: str, part: Held, rows: int) -> None:
        if not part.global_shape or part.global_shape[0] != rows:
            raise _wrong(name, part, f"{self._heads} make {rows} rows")


def _plain(name: str) -> str:
    """A name without its layer."""
    found = _LAYER.fullmatch(name)
    return found[3] if found else name


def _wrong(name: str, part: Held, wanted: str) -> WrongShape:
    return WrongShape(
        f"tensor {name!r} has the global shape {part.global_shape}, but {wanted}",
        remedy="give the adapter of this model, and the global shape of the tensor",
        tensor=name,
    )


def _shape(config: Any) -> tuple[Heads, int]:
    """The heads and the number of layers, from version 0.2's model arguments or version 0.3's model config."""
    layers = getattr(config, "layers", None)
    if layers is None:
        return _heads(config, config.dim), int(config.n_layers)
    found = {_heads(layer.attention, config.dim) for layer in layers}
    if len(found) != 1:
        raise UnknownModel(
            f"the model has layers of different heads: {', '.join(map(str, found))}",
            remedy="give Hugging Face names and shards yourself",
        )
    return found.pop(), len(layers)


def _heads(attention: Any, dim: int) -> Heads:
    queries = int(attention.n_heads)
    groups = int(getattr(attention, "n_kv_heads", None) or queries)
    return Heads(queries, groups, int(getattr(attention, "head_dim", None) or dim // queries))
