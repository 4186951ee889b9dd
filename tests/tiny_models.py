# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many families: their Hugging Face configurations, and the names and shapes of their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from stagingd_vllm.plan import StagedTensor

from stagingd.boxes import Shape

LAYERS, HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD = 2, 256, 320, 4, 2, 64
"""Blocks of 128 fall on some cuts and not on others."""
VOCAB = 101
"""No multiple of 64, to which vLLM pads, and odd: some ranks have padding."""
EXPERTS, EXPERT_WIDTH = 8, 256
BASE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
SPARSE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_WIDTH,
    "head_dim": HEAD,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 20,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}


@dataclass(frozen=True)
class TinyModel:
    """A model: the class of its configuration in transformers, that of the model, and what is special about it.

    ``fused`` experts are staged as two tensors of three dims; without ``exact_biases`` nothing is staged in float32.
    """

    config: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    fused: bool = False
    exact_biases: bool = True

    @property
    def sparse(self) -> bool:
        """Whether it has experts."""
        return "num_experts_per_tok" in self.options

    def save_config(self, path: Path) -> None:
        """Writes config.json."""
        options = BASE | self.options
        config = getattr(transformers, self.config)(**options, tie_word_embeddings=self.tied)
        config.architectures = [self.architecture]
        config.save_pretrained(path)

    def staged(self) -> dict[str, StagedTensor]:
        """The tensors of its checkpoint, as a trainer stages them."""
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            shapes |= {prefix + name: shape for name, shape in self._layer(layer).items()}
        shapes["model.norm.weight"] = (HIDDEN,)
        if not self.tied:
            shapes["lm_head.weight"] = (VOCAB, HIDDEN)
        exact = ".e_score_correction_bias" if self.exact_biases else "none"
        return {
            name: StagedTensor("float32" if name.endswith(exact) else "bfloat16", shape)
            for name, shape in shapes.items()
        }

    def _layer(self, layer: int) -> dict[str, Shape]:
        attention = _latent_attention() if self.config == "DeepseekV3Config" else self._attention()
        dense = not self.sparse or layer < self.options.get("first_k_dense_replace", 0)
        norms: dict[str, Shape] = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
        return {
            **{f"self_attn.{name}": shape for name, shape in attention.items()},
            **(_gated("mlp.", WIDTH) if dense else self._experts()),
            **norms,
        }

    def _attention(self) -> dict[str, Shape]:
        rows = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
        shapes: dict[str, Shape] = {f"{which}_proj.weight": (size, HIDDEN) for which, size in rows.items()}
        if self.config == "Qwen2Config":
            shapes |= {f"{which}_proj.bias": (size,) for which, size in rows.items()}
        if self.config.startswith("Qwen3"):
            shapes |= {"q_norm.weight": (HEAD,), "k_norm.weight": (HEAD,)}
        return shapes | {"o_proj.weight": (HIDDEN, HEADS * HEAD)}

    def _experts(self) -> dict[str, Shape]:
        if self.config == "MixtralConfig":
            shapes: dict[str, Shape] = {"block_sparse_moe.gate.weight": (EXPERTS, HIDDEN)}
            for expert in range(EXPERTS):
                prefix = f"block_sparse_moe.experts.{expert}."
                shapes |= {f"{prefix}w1.weight": (WIDTH, HIDDEN), f"{prefix}w3.weight": (WIDTH, HIDDEN)}
                shapes[f"{prefix}w2.weight"] = (HIDDEN, WIDTH)
            return shapes
        shapes = {"mlp.gate.weight": (EXPERTS, HIDDEN)}
        if self.fused:
            shapes["mlp.experts.gate_up_proj"] = (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN)
            shapes["mlp.experts.down_proj"] = (EXPERTS, HIDDEN, EXPERT_WIDTH)
            return shapes
        for expert in range(EXPERTS):
            shapes |= _gated(f"mlp.experts.{expert}.", EXPERT_WIDTH)
        if "n_shared_experts" in self.options:
            shapes["mlp.gate.e_score_correction_bias"] = (EXPERTS,)
            shapes |= _gated("mlp.shared_experts.", EXPERT_WIDTH * self.options["n_shared_experts"])
        return shapes


def _gated(prefix: str, width: int) -> dict[str, Shape]:
    up, down = (width, HIDDEN), (HIDDEN, width)
    return {f"{prefix}gate_proj.weight": up, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": down}


def _latent_attention() -> dict[str, Shape]:
    query, latent = LATENT["q_lora_rank"], LATENT["kv_lora_rank"]
    rope, nope, value = LATENT["qk_rope_head_dim"], LATENT["qk_nope_head_dim"], LATENT["v_head_dim"]
    return {
        "q_a_proj.weight": (query, HIDDEN),
        "q_a_layernorm.weight": (query,),
        "q_b_proj.weight": (HEADS * (nope + rope), query),
        "kv_a_proj_with_mqa.weight": (latent + rope, HIDDEN),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (HEADS * (nope + value), latent),
        "o_proj.weight": (HIDDEN, HEADS * value),
    }


MODELS = {
    "llama": TinyModel("LlamaConfig", "LlamaForCausalLM", {"head_dim": HEAD}),
    "qwen2 with biases": TinyModel("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": TinyModel("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": HEAD}),
    "qwen3, tied": TinyModel("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": HEAD}, tied=True),
    "qwen3-moe": TinyModel("Qwen3MoeConfig", "Qwen3MoeForCausalLM", SPARSE),
    "qwen3-moe, fused experts": TinyModel("Qwen3MoeConfig", "Qwen3MoeForCausalLM", SPARSE, fused=True),
    "mixtral": TinyModel(
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": HEAD},
    ),
    "deepseek-v3": TinyModel("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT),
    "deepseek-v3, all in bfloat16": TinyModel("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT, exact_biases=False),
}
