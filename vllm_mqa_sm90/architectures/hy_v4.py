# SPDX-License-Identifier: Apache-2.0
"""Hy4-preview (HY V4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_mqa_sm90.architectures.deepseek_v32 import ENDS, draft_inputs, indexer, latent_attention, norms_before
from vllm_mqa_sm90.architectures.tensors import TP_SIZE, Tensor, ends, hyper_connection, mlp


def hyv4_config(layers: int, experts: int) -> dict[str, Any]:
    """Hy4-preview's config.json as one rank of TP=8 sees it, with `layers` layers and `experts` experts.

    Its indexer has 32 heads. A config without the number gets 16, fewer than vLLM's prefill takes on Hopper.
    """
    dense = min(1, layers - 1)
    return {
        "architectures": ["HYV4ForCausalLM"],
        "model_type": "hy_v4",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "enable_ihc": True,
        "enable_lm_head_fp32": True,
        "gated_mla": True,
        "gating_type": "elementwise",
        "hc_eps": 1e-6,
        "hc_magnitude": 2.0,
        "hc_mult": 4,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_topk": 2048,
        "indexer_types": ["full" if layer == 0 or layer % 4 == 1 else "shared" for layer in range(layers)],
        "initializer_range": 0.006,
        "intermediate_size": 18432 // TP_SIZE,
        "kv_lora_rank": 512,
        "layer_types": ["deepseek_sparse_attention"] * layers,
        "learnable_sink": True,
        "max_position_embeddings": 1048576,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "moe_intermediate_size": 2048 // TP_SIZE,
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
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
        "routed_scaling_factor": 2.827,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "v_head_dim": 256,
        "vocab_size": 120832 // TP_SIZE,
    }


def hyv4_shards(config: dict[str, Any]) -> Iterator[list[Tensor]]:
    """The released checkpoint's tensors under its own names, one list per file."""
    hidden = config["hidden_size"]
    yield [
        *ends(config, *ENDS),
        *hyper_connection("model.hc_head.hc_head", config, mixes=config["hc_mult"], scales=1),
    ]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        full, dense = config["indexer_types"][layer] == "full", config["mlp_layer_types"][layer] == "dense"
        yield [
            *_layer(prefix, config, full, dense),
            # For each stream: how much of it goes in, and of the result comes back.
            *hyper_connection(prefix + "hc_attn_layer.hc_pre.hc", config, mixes=2 * config["hc_mult"], scales=2),
            *hyper_connection(prefix + "hc_mlp_layer.hc_pre.hc", config, mixes=2 * config["hc_mult"], scales=2),
        ]
    # The MTP layer has one stream; embedding and head are the model's.
    prefix = "model.mtp_layers.0."
    yield [
        *_layer(prefix, config, full=True, dense=False),
        *draft_inputs(prefix, hidden),
        Tensor(prefix + "final_layernorm.weight", (hidden,), gain=None),
    ]


def _layer(prefix: str, config: dict[str, Any], full: bool, dense: bool) -> Iterator[Tensor]:
    c, hidden, heads = config, config["hidden_size"], config["num_attention_heads"]
    yield from norms_before(prefix, hidden)
    attn, ffn = prefix + "self_attn.", prefix + "mlp."
    yield from latent_attention(attn, c)
    yield Tensor(attn + "linear_gate.weight", (heads * c["v_head_dim"], hidden))
    yield Tensor(attn + "learnable_sink_param", (heads,), gain=0.0)
    if full:
        yield from indexer(attn + "indexer.", c)
    if dense:
        yield from mlp(ffn, hidden, c["intermediate_size"])
        return
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    yield Tensor(ffn + "gate.weight", (experts, hidden), dtype="float32")
    yield Tensor(ffn + "gate.e_score_correction_bias", (experts,), gain=0.0, dtype="float32")
    yield from mlp(ffn + "shared_experts.", hidden, width * c["n_shared_experts"])
    yield Tensor(ffn + "experts.gate_up_proj", (experts, 2 * width, hidden))
    yield Tensor(ffn + "experts.down_proj", (experts, hidden, width))
