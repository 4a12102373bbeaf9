# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4.1-Flash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_mqa_sm90.architectures.deepseek_v4 import ENDS, fp8_mixture, shared_key_attention
from vllm_mqa_sm90.architectures.tensors import FP8_BLOCK, TP_SIZE, Tensor, ends, fp8, streams

DRAFTERS = 3
MARKOV_RANK = 256


def v41_config(layers: int, experts: int) -> dict[str, Any]:
    """DeepSeek-V4.1-Flash's config.json as one rank of TP=8 sees it, with `layers` layers and `experts` experts.

    Half of its layers keep a key for every two tokens, the others one for each, as do the released model's that see
    more than a sliding window. Of the second half the first publishes blocks of keys, in which the indexers after it choose:
    the next layer's, then every fourth's. Left out are the vision encoder and the n-gram tables.

    Weights are FP8 in blocks of 128, as DeepSeek-V4-Flash-Base's; the released ones are FP8 in blocks of 32, and FP4.
    """
    half = layers // 2
    sources = [*range(0, half, 6), half]  # of keys
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "expert_dtype": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
        "text_config": {
            "model_type": "deepseek_v41_text",
            "attention_bias": False,
            "candidate_block_size": 8,
            "candidate_source_layer_id": half,
            "candidate_topk_blocks": 2048,
            "compress_ratios": [2] * half + [1] * (layers - half) + [0] * DRAFTERS,
            "compress_rope_theta": 160000,
            "dspark_block_size": 5,
            "dspark_markov_rank": MARKOV_RANK,
            "dspark_n_routed_experts": experts,
            "dspark_noise_token_id": 3,
            "dspark_num_experts_per_tok": 3,
            # What goes into the last three layers; of one layer, what comes out.
            "dspark_target_layer_ids": list(range(max(1, layers - 3), max(2, layers))),
            "hc_eps": 1e-6,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "head_dim": 512,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "index_head_dim": 128,
            "index_n_heads": 32,
            "index_source_layer_ids": [*sources, *range(half + 1, layers, 4)],
            "index_topk": 512,
            "initializer_range": 0.02,
            "kv_source_layer_ids": sources,
            "max_position_embeddings": 1048576,
            # An eighth of 2304 is no multiple of a block.
            "moe_intermediate_size": 2304 // TP_SIZE // FP8_BLOCK * FP8_BLOCK,
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 64 // TP_SIZE,
            "num_experts_per_tok": 6,
            "num_hidden_layers": layers,
            "num_key_value_heads": 1,
            "num_nextn_predict_layers": DRAFTERS,
            "o_groups": 8 // TP_SIZE,
            "o_lora_rank": 1024,
            "q_lora_rank": 1280,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-20,
            "rope_scaling": {
                "rope_type": "yarn",
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
            "vocab_size": 129280 // TP_SIZE,
        },
    }


def v41_shards(config: dict[str, Any]) -> Iterator[list[Tensor]]:
    """The released checkpoint's tensors under its own names, one list per file."""
    c = config["text_config"]
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    yield [
        *ends(c, *ENDS),
        # Of the vision encoder's output the part that vLLM keeps without it.
        *(Tensor(f"image_{part}", (hidden,), gain=None, dtype="float32") for part in ("start", "newline", "end")),
    ]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        yield [*_layer(prefix, c, c["n_routed_experts"]), *_sources(prefix + "attn.", c, layer)]
    # DSpark's layers attend to a sliding window alone; embedding and head are the model's.
    for stage in range(DRAFTERS):
        yield list(_layer(f"mtp.{stage}.", c, c["dspark_n_routed_experts"]))
    first, last, rank = "mtp.0.", f"mtp.{DRAFTERS - 1}.", c["dspark_markov_rank"]
    yield [
        *fp8(first + "main_proj", (hidden, hidden * len(c["dspark_target_layer_ids"]))),
        Tensor(first + "main_norm.weight", (hidden,), gain=None),
        Tensor(last + "norm.weight", (hidden,), gain=None),
        Tensor(last + "markov_head.embed.weight", (vocab, rank), gain=rank**0.5),
        Tensor(last + "markov_head.head.weight", (vocab, rank)),
        Tensor(last + "confidence_head.proj.weight", (1, hidden + rank), dtype="float32"),
    ]


def _layer(prefix: str, config: dict[str, Any], experts: int) -> Iterator[Tensor]:
    for part in "attn", "ffn":
        yield Tensor(f"{prefix}{part}_norm.weight", (config["hidden_size"],), gain=None)
    yield from streams(prefix, config)
    yield from shared_key_attention(prefix + "attn.", config)
    yield Tensor(prefix + "ffn.gate.bias", (experts,), gain=0.0, dtype="float32")
    yield from fp8_mixture(prefix + "ffn.", config, experts)


def _sources(attn: str, config: dict[str, Any], layer: int) -> Iterator[Tensor]:
    """What makes keys, of the attention and from those of the indexer, and what chooses: each in few layers."""
    hidden, head_dim, index_dim = config["hidden_size"], config["head_dim"], config["index_head_dim"]
    if layer in config["kv_source_layer_ids"]:
        yield Tensor(attn + "compressor.wkv.weight", (head_dim, hidden))
        if config["compress_ratios"][layer] > 1:
            yield Tensor(attn + "compressor.wgate.weight", (head_dim, hidden))
        yield Tensor(attn + "compressor.norm.weight", (head_dim,), gain=None)
        yield Tensor(attn + "indexer.wk.weight", (index_dim, head_dim))
        yield Tensor(attn + "indexer.k_norm.weight", (index_dim,), gain=None)
    if layer in config["index_source_layer_ids"]:
        yield from fp8(attn + "indexer.wq_b", (config["index_n_heads"] * index_dim, config["q_lora_rank"]))
        yield Tensor(attn + "indexer.weights_proj.weight", (config["index_n_heads"], hidden))
