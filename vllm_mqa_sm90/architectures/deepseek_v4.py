# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4-Flash-Base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_mqa_sm90.architectures.tensors import FP8_BLOCK, TP_SIZE, Tensor, ends, fp8, fp8_mlp, hyper_connection, streams

ENDS = "embed", "norm", "head"


def v4_config(layers: int, experts: int) -> dict[str, Any]:
    """DeepSeek-V4-Flash-Base's config.json as one rank of TP=8 sees it, with `layers` layers and `experts` experts.

    In turn its layers keep a key for every 4 tokens, those have the indexer, and for every 128. The two layers that the
    released model starts with attend to a sliding window alone and are left out; the MTP layer is such a one.
    """
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "compress_ratios": [(4, 128)[layer % 2] for layer in range(layers)] + [0],
        "compress_rope_theta": 160000,
        "expert_dtype": "fp8",
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048 // TP_SIZE,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64 // TP_SIZE,
        "num_experts_per_tok": 6,
        "num_hash_layers": min(1, layers - 1),
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 8 // TP_SIZE,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "vocab_size": 129280 // TP_SIZE,
    }


def v4_shards(config: dict[str, Any]) -> Iterator[list[Tensor]]:
    """The released checkpoint's tensors under its own names, one list per file."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield [
        *ends(config, *ENDS),
        *hyper_connection("hc_head", config, mixes=config["hc_mult"], scales=1),
    ]
    for layer in range(config["num_hidden_layers"]):
        yield list(_v4_layer(config, f"layers.{layer}.", layer))
    prefix = "mtp.0."
    yield [
        *_v4_layer(config, prefix, config["num_hidden_layers"]),
        Tensor(prefix + "enorm.weight", (hidden,), gain=None),
        Tensor(prefix + "hnorm.weight", (hidden,), gain=None),
        *fp8(prefix + "e_proj", (hidden, hidden)),
        *fp8(prefix + "h_proj", (hidden, hidden)),
        Tensor(prefix + "emb.tok_emb.weight", (vocab, hidden), gain=hidden**0.5, alike="embed.weight"),
        Tensor(prefix + "norm.weight", (hidden,), gain=None),
        Tensor(prefix + "head.weight", (vocab, hidden), alike="head.weight"),
        *hyper_connection(prefix + "hc_head", config, mixes=config["hc_mult"], scales=1),
    ]


def _v4_layer(config: dict[str, Any], prefix: str, layer: int) -> Iterator[Tensor]:
    c, attn, ratio = config, prefix + "attn.", config["compress_ratios"][layer]
    for part in "attn", "ffn":
        yield Tensor(f"{prefix}{part}_norm.weight", (c["hidden_size"],), gain=None)
    yield from streams(prefix, c)
    yield from shared_key_attention(attn, c)
    if ratio:
        yield from _compressor(attn + "compressor.", c["hidden_size"], c["head_dim"], ratio)
    if ratio == 4:
        indexer, index_heads, index_dim = attn + "indexer.", c["index_n_heads"], c["index_head_dim"]
        yield from fp8(indexer + "wq_b", (index_heads * index_dim, c["q_lora_rank"]))
        yield Tensor(indexer + "weights_proj.weight", (index_heads, c["hidden_size"]))
        yield from _compressor(indexer + "compressor.", c["hidden_size"], index_dim, ratio)

    ffn, experts = prefix + "ffn.", c["n_routed_experts"]
    if layer < c["num_hash_layers"]:
        shape = c["vocab_size"], c["num_experts_per_tok"]
        yield Tensor(ffn + "gate.tid2eid", shape, dtype="int64", below=experts)
    else:
        yield Tensor(ffn + "gate.bias", (experts,), gain=0.0, dtype="float32")
    yield from fp8_mixture(ffn, c, experts)


def shared_key_attention(attn: str, config: dict[str, Any]) -> Iterator[Tensor]:
    """Attention whose one key head is the values, too."""
    c, hidden, heads, head_dim = config, config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    q_rank, o_rank, groups = c["q_lora_rank"], c["o_lora_rank"], c["o_groups"]
    yield Tensor(attn + "attn_sink", (heads,), gain=0.0, dtype="float32")
    yield from fp8(attn + "wq_a", (q_rank, hidden))
    yield Tensor(attn + "q_norm.weight", (q_rank,), gain=None)
    yield from fp8(attn + "wq_b", (heads * head_dim, q_rank))
    yield from fp8(attn + "wkv", (head_dim, hidden))
    yield Tensor(attn + "kv_norm.weight", (head_dim,), gain=None)
    yield from fp8(attn + "wo_a", (groups * o_rank, heads * head_dim // groups))
    # As the o_proj of DeepSeek-V3.2.
    yield from fp8(attn + "wo_b", (hidden, groups * o_rank), gain=3.0)


def fp8_mixture(ffn: str, config: dict[str, Any], experts: int) -> Iterator[Tensor]:
    """`experts` routed experts, the weights of their gate, and those that all tokens share."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield Tensor(ffn + "gate.weight", (experts, hidden))
    yield from fp8_mlp(ffn + "shared_experts.", hidden, width * config["n_shared_experts"])
    for expert in range(experts):
        yield from fp8_mlp(f"{ffn}experts.{expert}.", hidden, width)


def _compressor(prefix: str, hidden: int, head_dim: int, ratio: int) -> Iterator[Tensor]:
    """What makes one key of `ratio` tokens; with ratio 4 of 8, half of them also in the key before."""
    width = head_dim * 2 if ratio == 4 else head_dim
    yield Tensor(prefix + "wkv.weight", (width, hidden))
    yield Tensor(prefix + "wgate.weight", (width, hidden))
    yield Tensor(prefix + "ape", (ratio, width), dtype="float32")
    yield Tensor(prefix + "norm.weight", (head_dim,), gain=None)
