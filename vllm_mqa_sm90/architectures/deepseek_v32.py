# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3.2 and GLM-5.2, whose layers are alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_mqa_sm90.architectures.tensors import TP_SIZE, Tensor, ends, mlp

ENDS = "model.embed_tokens", "model.norm", "lm_head"


def v32_config(layers: int, experts: int) -> dict[str, Any]:
    """DeepSeek-V3.2's config.json as one rank of TP=8 sees it, with `layers` layers and `experts` experts."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "first_k_dense_replace": min(1, layers - 1),
        "hidden_act": "silu",
        "hidden_size": 7168,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 18432 // TP_SIZE,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048 // TP_SIZE,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128 // TP_SIZE,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 128 // TP_SIZE,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 129280 // TP_SIZE,
    }


def glm_config(layers: int, experts: int) -> dict[str, Any]:
    """GLM-5.2's config.json as one rank of TP=8 sees it, with `layers` layers and `experts` experts."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "first_k_dense_replace": min(1, layers - 1),
        "hidden_act": "silu",
        "hidden_size": 6144,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_share_for_mtp_iteration": True,
        "index_skip_topk_offset": 3,
        "index_topk": 2048,
        "index_topk_freq": 4,
        "indexer_rope_interleave": True,
        "initializer_range": 0.02,
        "intermediate_size": 12288 // TP_SIZE,
        "kv_lora_rank": 512,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048 // TP_SIZE,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64 // TP_SIZE,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 64 // TP_SIZE,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8000000},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": 256,
        "vocab_size": 154880 // TP_SIZE,
    }


def v32_shards(config: dict[str, Any]) -> Iterator[list[Tensor]]:
    """The released checkpoint's tensors under its own names, one list per file. GLM-5.x names them alike."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    yield list(ends(config, *ENDS))
    for layer in range(layers):
        yield list(_v32_layer(config, layer))
    # The MTP layer is stored as one layer more, with its own copy of embedding and head.
    prefix = f"model.layers.{layers}."
    yield [
        *_v32_layer(config, layers),
        *draft_inputs(prefix, hidden),
        Tensor(prefix + "embed_tokens.weight", (vocab, hidden), gain=hidden**0.5, alike="model.embed_tokens.weight"),
        Tensor(prefix + "shared_head.norm.weight", (hidden,), gain=None),
        Tensor(prefix + "shared_head.head.weight", (vocab, hidden), alike="lm_head.weight"),
    ]


def has_indexer(config: dict[str, Any], layer: int) -> bool:
    """Whether `layer` chooses its tokens itself; in GLM-5.2 three of four layers take those of an earlier one."""
    if layer == config["num_hidden_layers"]:
        return True
    past = max(layer + 1 - config.get("index_skip_topk_offset", 0), 0)
    return past % config.get("index_topk_freq", 1) == 0


def _v32_layer(config: dict[str, Any], layer: int) -> Iterator[Tensor]:
    c, prefix = config, f"model.layers.{layer}."
    yield from norms_before(prefix, c["hidden_size"])
    yield from latent_attention(prefix + "self_attn.", c)
    if has_indexer(config, layer):
        yield from indexer(prefix + "self_attn.indexer.", c)
    if layer < c["first_k_dense_replace"]:
        yield from mlp(prefix + "mlp.", c["hidden_size"], c["intermediate_size"])
    else:
        yield from mixture(prefix + "mlp.", c)


def norms_before(prefix: str, hidden: int) -> Iterator[Tensor]:
    """Of what goes into a layer's attention, and into what follows it."""
    for part in "input", "post_attention":
        yield Tensor(f"{prefix}{part}_layernorm.weight", (hidden,), gain=None)


def draft_inputs(prefix: str, hidden: int) -> Iterator[Tensor]:
    """What joins a token's embedding and the model's hidden state for an MTP layer."""
    yield Tensor(prefix + "enorm.weight", (hidden,), gain=None)
    yield Tensor(prefix + "hnorm.weight", (hidden,), gain=None)
    yield Tensor(prefix + "eh_proj.weight", (hidden, 2 * hidden))


def latent_attention(attn: str, config: dict[str, Any]) -> Iterator[Tensor]:
    """Queries and keys by way of low ranks: multi-head latent attention."""
    c, hidden, heads = config, config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, v_dim = c["qk_nope_head_dim"], c["v_head_dim"]
    yield Tensor(attn + "q_a_proj.weight", (q_rank, hidden))
    yield Tensor(attn + "q_a_layernorm.weight", (q_rank,), gain=None)
    yield Tensor(attn + "q_b_proj.weight", (heads * (nope + rope), q_rank))
    yield Tensor(attn + "kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden))
    yield Tensor(attn + "kv_a_layernorm.weight", (kv_rank,), gain=None)
    yield Tensor(attn + "kv_b_proj.weight", (heads * (nope + v_dim), kv_rank))
    # Averaging over many keys shrinks the values; this keeps the context's part in the residual large.
    yield Tensor(attn + "o_proj.weight", (hidden, heads * v_dim), gain=3.0)


def indexer(prefix: str, config: dict[str, Any]) -> Iterator[Tensor]:
    """What chooses a layer's tokens."""
    hidden, heads, head_dim = config["hidden_size"], config["index_n_heads"], config["index_head_dim"]
    yield Tensor(prefix + "wq_b.weight", (heads * head_dim, config["q_lora_rank"]))
    yield Tensor(prefix + "wk.weight", (head_dim, hidden))
    yield Tensor(prefix + "k_norm.weight", (head_dim,), gain=None, dtype="float32")
    yield Tensor(prefix + "k_norm.bias", (head_dim,), gain=0.0, dtype="float32")
    yield Tensor(prefix + "weights_proj.weight", (heads, hidden))


def mixture(prefix: str, config: dict[str, Any]) -> Iterator[Tensor]:
    """Routed experts, their gate, and those that all tokens share."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield Tensor(prefix + "gate.weight", (config["n_routed_experts"], hidden))
    yield Tensor(prefix + "gate.e_score_correction_bias", (config["n_routed_experts"],), gain=0.0, dtype="float32")
    yield from mlp(prefix + "shared_experts.", hidden, width * config["n_shared_experts"])
    for expert in range(config["n_routed_experts"]):
        yield from mlp(f"{prefix}experts.{expert}.", hidden, width)
