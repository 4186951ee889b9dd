# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan's shards, named, against the model's own adapter on its full tensors: same names, same bits.

The models are those of the TorchTitan that is installed, version 0.2 or 0.3. What 0.3 has and 0.2 has not
(fused q|k|v, other names, layers that predict further tokens) is tried in any case, on
tensors and adapters of its form.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from assembling import Assembly, numbered, part_of, shards_of
from stagingd_client.modules import Modules
from stagingd_client.naming import SameNames
from stagingd_client.placement import held
from stagingd_client.torchtitan_names import TorchTitanNames
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from stagingd.errors import UnknownModel, UnknownTensor, WrongShape

# Only one version can be installed, so its models are imported where they are made.
VERSION = importlib.metadata.version("torchtitan")


@dataclass(frozen=True)
class Model:
    """The tensors that a trainer lists, the adapter, and what the adapter makes of the state dict."""

    tensors: Mapping[str, torch.Tensor]
    adapter: Any
    wanted: Mapping[str, torch.Tensor]


def of_module(module: nn.Module, adapter: Any) -> Model:
    """A real model, every element of which is another number."""
    first = 0
    tensors = {name: tensor.detach() for name, tensor in Modules(module).tensors()}
    for tensor in tensors.values():
        tensor.copy_(numbered(*tensor.shape, first=first))
        first += tensor.numel()
    assert first < 1 << 24, "not every number is another one in fp32"
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return Model(tensors, adapter, adapter.to_hf(state))


# Version 0.2: the debug models, made small


def llama3_of_02() -> Model:
    from torchtitan.models.llama3 import Llama3StateDictAdapter, Transformer, llama3_args  # noqa: PLC0415

    args = replace(llama3_args["debugmodel"], dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, max_seq_len=8)
    return of_module(Transformer(args), Llama3StateDictAdapter(args, None))


def qwen3_of_02(flavor: str, **changes: Any) -> Model:
    from torchtitan.models.qwen3 import Qwen3Model, Qwen3StateDictAdapter, qwen3_args  # noqa: PLC0415

    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 48}
    args = replace(qwen3_args[flavor], **small, vocab_size=96, max_seq_len=8, **changes)
    if args.moe_enabled:
        args = replace(args, moe_inter_dim=24, moe_args=replace(args.moe_args, num_experts=6))
    return of_module(Qwen3Model(args), Qwen3StateDictAdapter(args, None))


def deepseek_v3_of_02(q_lora_rank: int) -> Model:
    from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3StateDictAdapter, deepseekv3_args  # noqa: PLC0415

    ranks = {"q_lora_rank": q_lora_rank, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    args = replace(deepseekv3_args["debugmodel"], dim=32, inter_dim=40, moe_inter_dim=12, n_layers=2, n_heads=4)
    args = replace(args, **ranks, v_head_dim=8, vocab_size=96, max_seq_len=8)
    args.moe_impl = "standard"  # otherwise set from the job's settings
    return of_module(DeepSeekV3Model(args), DeepSeekV3StateDictAdapter(args, None))


# Version 0.3


def llama3_of_03(fuse_qkv: bool, tied: bool = False) -> Model:
    from torchtitan.models import llama3  # noqa: PLC0415

    config = llama3.model_registry("debugmodel").model
    rope = replace(config.layers[0].attention.rope, dim=16, max_seq_len=8)
    sizes = {"n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
    config.layers = llama3._build_llama3_layers(**sizes, rope=rope, fuse_qkv=fuse_qkv, attn_backend="flex")
    return of_03(config, llama3.Llama3StateDictAdapter, dim=64, enable_weight_tying=tied)


def qwen3_of_03(fuse_qkv: bool, experts: bool) -> Model:
    from torchtitan.models import qwen3  # noqa: PLC0415

    config = qwen3.model_registry("debugmodel_moe" if experts else "debugmodel").model
    rope = replace(config.layers[0].attention.rope, dim=16, max_seq_len=8)
    sizes = {"n_layers": 2, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
    common = {**sizes, "rope": rope, "fuse_qkv": fuse_qkv, "attn_backend": "flex"}
    if experts:
        moe = {"moe_hidden_dim": 24, "num_experts": 6, "top_k": 2, "moe_comm_backend": "standard"}
        config.layers = qwen3._build_qwen3_moe_layers(**common, **moe)
    else:
        config.layers = qwen3._build_qwen3_layers(**common, hidden_dim=48)
    return of_03(config, qwen3.Qwen3StateDictAdapter, dim=32)


def deepseek_v3_of_03() -> Model:
    from torchtitan.models import deepseek_v3  # noqa: PLC0415

    spec = deepseek_v3.model_registry("debugmodel", moe_comm_backend="standard", attn_backend="flex", num_mtp_layers=1)
    config = spec.model
    del config.layers[2:]
    return of_03(config, deepseek_v3.DeepSeekV3StateDictAdapter, dim=256)


def of_03(config: Any, adapter: Callable[..., Any], dim: int, **changes: Any) -> Model:
    embedding = replace(config.tok_embeddings, num_embeddings=96, embedding_dim=dim)
    head = replace(config.lm_head, in_features=dim, out_features=96)
    norm = replace(config.norm, normalized_shape=dim)
    config = replace(config, dim=dim, vocab_size=96, tok_embeddings=embedding, lm_head=head, norm=norm, **changes)
    return of_module(config.build(), adapter(config, None))


# The form of version 0.3, by hand


class _Adapter:
    """What 0.3's adapters have in common: a table by which they rename, and split grouped experts."""

    def __init__(self, config: SimpleNamespace, table: Mapping[str, str | None]) -> None:
        self.model_config = config
        self.from_hf_map = table

    def converted(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {native: name for name, native in self.from_hf_map.items()}
        found = {}
        for key, value in state.items():
            layer = re.search(r"(mtp_)?layers\.(\d+)", key)
            number = int(layer[2]) + (len(self.model_config.layers) if layer[1] else 0) if layer else 0
            template = names.get(re.sub(r"(mtp_)?layers\.\d+", "layers.{}", key))
            if template is None or (key == "lm_head.weight" and self.model_config.enable_weight_tying):
                continue
            if template.count("{}") == 2:
                found |= {template.format(number, expert): rows for expert, rows in enumerate(value)}
            else:
                found[template.format(number)] = value
        return found


class Llama3StateDictAdapter(_Adapter):
    def to_hf(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head_rows = self.model_config.layers[0].attention.head_dim
        turned = dict(state)
        for name, value in state.items():
            if re.search(r"\.w[qk]\.", name):
                paired = value.view(-1, head_rows // 2, 2, value.shape[1])
                turned[name] = torch.cat([paired[:, :, 0], paired[:, :, 1]], dim=1).view(value.shape)
        return self.converted(turned)


class Qwen3StateDictAdapter(_Adapter):
    def to_hf(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.converted(state)


class DeepSeekV3StateDictAdapter(_Adapter):
    def to_hf(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.converted(state)


class Llama4StateDictAdapter(Qwen3StateDictAdapter):
    def to_hf(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}


TABLE_03: dict[str, str | None] = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.qkv_linear.wq.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.qkv_linear.wk.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.qkv_linear.wv.weight",
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
    "model.layers.{}.mlp.experts.{}.gate_proj.weight": "layers.{}.moe.routed_experts.inner_experts.w1_EFD",
    "model.layers.{}.enorm.weight": "layers.{}.enorm.weight",
    "lm_head.weight": "lm_head.weight",
}
BIAS = {"model.layers.{}.mlp.gate.e_score_correction_bias": "layers.{}.moe.expert_bias_E"}


def by_hand(adapter: Callable[..., _Adapter], fused: bool, tied: bool = False) -> Model:
    """Two layers of 8 heads in 2 groups, of which the second layer has experts, and one that is predicted from them."""
    attention = SimpleNamespace(n_heads=8, n_kv_heads=2, head_dim=6)
    config = SimpleNamespace(dim=5, layers=[SimpleNamespace(attention=attention)] * 2, enable_weight_tying=tied)
    state = {"tok_embeddings.weight": numbered(11, 5), "layers.0.feed_forward.w2.weight": numbered(5, 7, first=100)}
    for layer in ("layers.0", "layers.1", "mtp_layers.0"):
        state[f"{layer}.attention.qkv_linear.wqkv.weight"] = numbered(2 * 6 * 6, 5, first=1000 * len(state))
    state["layers.1.moe.routed_experts.inner_experts.w1_EFD"] = numbered(6, 4, 5, first=9000)
    if adapter is not Llama3StateDictAdapter:
        state["layers.1.moe.expert_bias_E"] = numbered(6, first=9900)
    state["mtp_layers.0.enorm.weight"] = numbered(5, first=9950)
    if not fused:
        state = split_of(state)
    listed = dict(state)
    state["lm_head.weight"] = state["tok_embeddings.weight"] if tied else numbered(11, 5, first=200)
    if not tied:
        listed = dict(state)
    table = TABLE_03 | (BIAS if adapter is DeepSeekV3StateDictAdapter else {})
    made = adapter(config, table)
    return Model(listed, made, made.to_hf(split_of(state)))


def split_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the module's hook does when it makes a state dict: 2 groups of 4 query heads, a key and a value head."""
    found = {}
    for name, value in state.items():
        if ".wqkv." in name:
            grouped = value.reshape(2, 6, 6, 5)
            for which, rows in (("wq", grouped[:, :4]), ("wk", grouped[:, 4]), ("wv", grouped[:, 5])):
                found[name.replace("wqkv", which)] = rows.reshape(-1, 5)
        else:
            found[name] = value
    return found


MODELS: dict[str, Callable[[], Model]] = {
    "llama3 fused by hand": lambda: by_hand(Llama3StateDictAdapter, fused=True),
    "llama3 split and tied by hand": lambda: by_hand(Llama3StateDictAdapter, fused=False, tied=True),
    "qwen3 fused and tied by hand": lambda: by_hand(Qwen3StateDictAdapter, fused=True, tied=True),
    "deepseek_v3 by hand": lambda: by_hand(DeepSeekV3StateDictAdapter, fused=False),
}
if VERSION.startswith("0.2"):
    MODELS |= {
        "llama3 0.2": llama3_of_02,
        "qwen3 0.2 tied": lambda: qwen3_of_02("debugmodel"),
        "qwen3 0.2": lambda: qwen3_of_02("debugmodel", enable_weight_tying=False),
        "qwen3 0.2 experts": lambda: qwen3_of_02("debugmodel_moe"),
        "deepseek_v3 0.2": lambda: deepseek_v3_of_02(0),
        "deepseek_v3 0.2 q_lora": lambda: deepseek_v3_of_02(20),
    }
else:
    MODELS |= {
        "llama3 0.3 fused": lambda: llama3_of_03(True),
        "llama3 0.3 fused tied": lambda: llama3_of_03(True, tied=True),
        "llama3 0.3 split": lambda: llama3_of_03(False),
        "qwen3 0.3 fused": lambda: qwen3_of_03(True, False),
        "qwen3 0.3 split": lambda: qwen3_of_03(False, False),
        "qwen3 0.3 experts": lambda: qwen3_of_03(True, True),
        "deepseek_v3 0.3 mtp": deepseek_v3_of_03,
    }


@functools.cache
def made(model: str) -> Model:
    return MODELS[model]()


def chunks(count: int) -> Callable[[int], list[int]]:
    """The cuts between shards as torch makes them: all of the same size but the last."""
    return lambda size: [index * -(-size // count) for index in range(1, count)]


def odd(size: int) -> list[int]:
    """Cuts anywhere: inside heads, between the rows of a rotary pair."""
    return [1, size // 3, size // 2 + 1, size - 2]


def none(size: int) -> list[int]:
    return []


LAYOUTS: dict[str, list[Callable[[int], list[int]]]] = {
    "whole": [],
    "rows by 2": [chunks(2)],
    "rows by 3": [chunks(3)],
    "rows by 16": [chunks(16)],
    "odd rows": [odd],
    "columns by 2": [none, chunks(2)],
    "rows by 5, columns by 3": [chunks(5), chunks(3)],
    "experts by 2, rows by 2, columns by 3": [chunks(2), chunks(2), chunks(3)],
    "odd columns of experts": [none, none, odd],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_shards_of_all_ranks_are_what_the_adapter_makes_of_the_full_tensors(model: str, layout: str) -> None:
    trained = made(model)
    names = TorchTitanNames.of(trained.adapter)
    assembly = Assembly()
    for name, tensor in trained.tensors.items():
        if names.skips(name):
            continue
        cuts = [at(size) for at, size in zip(LAYOUTS[layout], tensor.shape, strict=False)]
        for part in shards_of(tensor, cuts):
            assembly.add(names.shards(name, part), part)
    found = assembly.tensors
    assert found.keys() == trained.wanted.keys()
    for name, tensor in trained.wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", MODELS)
def test_a_tied_output_is_an_alias_of_the_embedding(model: str) -> None:
    trained = made(model)
    names = TorchTitanNames.of(trained.adapter)
    tied = "lm_head.weight" not in trained.wanted
    assert tied == ("tied" in model or model in {"qwen3 0.3 fused", "qwen3 0.3 split"})
    assert names.aliases() == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert names.skips("output.weight") == names.skips("lm_head.weight") == tied


def test_whole_heads_and_groups_are_one_view_each() -> None:
    trained = made("llama3 fused by hand")
    names = TorchTitanNames.of(trained.adapter)
    name = "layers.0.attention.qkv_linear.wqkv.weight"
    shards = names.shards(name, part_of(trained.tensors[name]))
    assert [shard.name.rpartition(".self_attn.")[2] for shard in shards] == [
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
    ]
    assert [tuple(shard.part.values.shape) for shard in shards] == [(2, 4, 2, 3, 5), (2, 1, 2, 3, 5), (2, 6, 5)]


def test_real_shards_of_uneven_ranks_are_the_rotary_rows() -> None:
    trained = made("llama3 split and tied by hand")
    names = TorchTitanNames.of(trained.adapter)
    assembly = Assembly()
    for rank in range(10):
        dist.init_process_group("fake", rank=rank, world_size=10, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (2, 5))
            for which in ("wq", "wk"):
                name = f"layers.0.attention.qkv_linear.{which}.weight"
                shard = distribute_tensor(trained.tensors[name], mesh, [Replicate(), Shard(0)], src_data_rank=None)
                part = held(name, shard)
                if part is not None and mesh.get_coordinate()[0] == 1:  # type: ignore[index]
                    assembly.add(names.shards(name, part), part)
        finally:
            dist.destroy_process_group()
    assert len(assembly.tensors) == 2
    for name, tensor in assembly.tensors.items():
        assert torch.equal(tensor, trained.wanted[name])


def test_counters_and_rotary_caches_are_skipped_but_not_a_bias_that_has_a_name() -> None:
    of_qwen = TorchTitanNames.of(made("qwen3 fused and tied by hand").adapter)
    of_deepseek = TorchTitanNames.of(made("deepseek_v3 by hand").adapter)
    for names in (of_qwen, of_deepseek):
        assert names.skips("layers.3.moe.tokens_per_expert")
        assert names.skips("layers.3.moe.tokens_per_expert_E")
        assert names.skips("freqs_cis")
        assert not names.skips("layers.3.feed_forward.w2.weight")
    assert of_qwen.skips("layers.3.moe.expert_bias_E")
    assert not of_deepseek.skips("layers.3.moe.expert_bias_E")
    bias = torch.zeros(6, dtype=torch.float32)
    (shard,) = of_deepseek.shards("layers.3.moe.expert_bias_E", part_of(bias))
    assert shard.name == "model.layers.3.mlp.gate.e_score_correction_bias"
    assert shard.part.values.dtype == torch.float32


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    names = TorchTitanNames.of(made("llama3 fused by hand").adapter)
    with pytest.raises(UnknownTensor, match=r"nearest names are layers\.7\.feed_forward\.w2\.weight"):
        names.shards("layers.7.feed_forward.w4.weight", part_of(torch.zeros(2, 2)))
    with pytest.raises(UnknownTensor, match=r"lm_head\.weight"):
        names.shards("lm_haed.weight", part_of(torch.zeros(2, 2)))
    with pytest.raises(UnknownTensor, match=r"'layers\.0\.attention\.qkv_linear\.wqkv\.bias'"):
        names.shards("layers.0.attention.qkv_linear.wqkv.bias", part_of(torch.zeros(72)))


def test_a_tensor_of_another_model_is_refused() -> None:
    names = TorchTitanNames.of(made("llama3 fused by hand").adapter)
    for which, rows in (("wqkv", 72), ("wq", 48), ("wk", 12)):
        with pytest.raises(WrongShape, match=rf"Heads\(queries=8, groups=2, rows=6\) make {rows} rows"):
            names.shards(f"layers.0.attention.qkv_linear.{which}.weight", part_of(torch.zeros(70, 5)))
    with pytest.raises(WrongShape, match="grouped experts have 3 dims"):
        names.shards("layers.0.moe.routed_experts.inner_experts.w1_EFD", part_of(torch.zeros(4, 5)))


def test_an_adapter_of_an_unknown_family_is_refused_by_name() -> None:
    adapter = Llama4StateDictAdapter(SimpleNamespace(), TABLE_03)
    with pytest.raises(UnknownModel, match=r"test_naming\.Llama4StateDictAdapter .*one of Llama3StateDictAdapter"):
        TorchTitanNames.of(adapter)


def test_a_model_of_unlike_layers_is_refused() -> None:
    layers = [SimpleNamespace(attention=SimpleNamespace(n_heads=8, n_kv_heads=n, head_dim=6)) for n in (2, 4)]
    with pytest.raises(UnknownModel, match="layers of different heads"):
        TorchTitanNames.of(Llama3StateDictAdapter(SimpleNamespace(dim=5, layers=layers), TABLE_03))


def test_a_model_with_hugging_face_names_keeps_them() -> None:
    part = part_of(torch.zeros(2, 2))
    (shard,) = SameNames().shards("model.norm.weight", part)
    assert shard.name == "model.norm.weight"
    assert shard.part is part
    assert not SameNames().skips("model.norm.weight")
    assert SameNames().aliases() == {}
