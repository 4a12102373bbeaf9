# SPDX-License-Identifier: Apache-2.0
"""GLM-5.3-Flash, of whose layers one in four attends to keys, and chooses them by pools of four."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_mqa_sm90.architectures.deepseek_v32 import ENDS, draft_inputs, indexer, latent_attention, mixture, norms_before
from vllm_mqa_sm90.architectures.tensors import TP_SIZE, Tensor, ends, mlp, streams

SPARSE = "deepseek_sparse_attention"


def glm53_config(layers: int, experts: int) -> dict[str, Any]:
    """GLM-5.3-Flash's config.json as one rank of TP=8 sees it, with `layers` layers and `experts` experts.

    Every fourth layer has the indexer, as released, and so has the last one, that there be one at all. The architecture
    is that of the language model alone, which vLLM serves without the vision encoder.
    """
    sparse = [layer % 4 == 3 or layer == layers - 1 for layer in range(layers)]
    dense = min(1, layers - 1)
    return {
        "architectures": ["Glm5NextForCausalLM"],
        "model_type": "glm5_next",
        "dtype": "bfloat16",
        "text_config": {
            "model_type": "glm5_next_text",
            "dtype": "bfloat16",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "first_k_dense_replace": dense,
            "hc_eps": 1e-6,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "index_head_dim": 128,
            "index_kpool": 4,
            "index_kpool_always_select_tail": True,
            "index_kpool_compress": True,
            "index_n_heads": 16,
            "index_share_for_mtp_iteration": True,
            "index_topk": 2048,
            "indexer_rope_interleave": True,
            "indexer_types": ["full"] * layers,
            "initializer_range": 0.02,
            "intermediate_size": 12288 // TP_SIZE,
            "kv_lora_rank": 512,
            "layer_types": [SPARSE if each else "linear_attention" for each in sparse],
            "linear_attn_config": {
                "gate_lower_bound": -5.0,
                "head_dim": 128,
                "num_heads": 64 // TP_SIZE,
                "short_conv_kernel_size": 4,
            },
            "max_position_embeddings": 1048576,
            "mhc": True,
            "mla_use_nope": True,
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
            "moe_intermediate_size": 2048 // TP_SIZE,
            "moe_router_dtype": "float32",
            "n_group": 1,
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 64 // TP_SIZE,
            "num_experts_per_tok": 8,
            "num_hidden_layers": layers,
            "num_key_value_heads": 64 // TP_SIZE,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 256,
            "qk_rope_head_dim": 0,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "swiglu_limit": 10.0,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "use_cache": True,
            "v_head_dim": 256,
            "vocab_size": 154880 // TP_SIZE,
        },
    }


def glm53_shards(config: dict[str, Any]) -> Iterator[list[Tensor]]:
    """The language model's tensors under its own names, one list per file."""
    c = config["text_config"]
    hidden, vocab, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    yield list(ends(c, *ENDS))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        sparse = c["layer_types"][layer] == SPARSE
        yield [*_layer(prefix, c, sparse, layer < c["first_k_dense_replace"]), *streams(prefix, c)]
    # The MTP layer, a sparse one, with one stream and its own copy of the embedding; the head is the model's.
    prefix = f"model.layers.{layers}."
    yield [
        *_layer(prefix, c, sparse=True, dense=False),
        *draft_inputs(prefix, hidden),
        Tensor(prefix + "embed_tokens.weight", (vocab, hidden), gain=hidden**0.5, alike="model.embed_tokens.weight"),
        Tensor(prefix + "shared_head.norm.weight", (hidden,), gain=None),
    ]


def _layer(prefix: str, config: dict[str, Any], sparse: bool, dense: bool) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield from norms_before(prefix, hidden)
    attn = prefix + "self_attn."
    if sparse:
        yield from latent_attention(attn, config)
        yield from indexer(attn + "indexer.", config)
        # Of the four keys of a pool: what each weighs, by its token and by its place.
        pool, head_dim = config["index_kpool"], config["index_head_dim"]
        yield Tensor(attn + "indexer.index_kpool_compress_gate", (head_dim, hidden))
        yield Tensor(attn + "indexer.index_kpool_compress_ape", (pool, head_dim), dtype="float32")
    else:
        yield from _linear_attention(attn, config)
    if dense:
        yield from mlp(prefix + "mlp.", hidden, config["intermediate_size"])
    else:
        yield from mixture(prefix + "mlp.", config)


def _linear_attention(attn: str, config: dict[str, Any]) -> Iterator[Tensor]:
    """Kimi delta attention: a state for each head instead of keys, which forgets by a gate for each channel."""
    c, hidden = config["linear_attn_config"], config["hidden_size"]
    heads, head_dim, kernel = c["num_heads"], c["head_dim"], c["short_conv_kernel_size"]
    width = heads * head_dim
    for part in "qkv":
        yield Tensor(f"{attn}{part}_proj.weight", (width, hidden))
        yield Tensor(f"{attn}{part}_conv1d.weight", (width, 1, kernel))
    yield Tensor(attn + "b_proj.weight", (heads, hidden))
    for gate in "fg":  # of forgetting, and of the output
        yield Tensor(f"{attn}{gate}_a_proj.weight", (head_dim, hidden))
        yield Tensor(f"{attn}{gate}_b_proj.weight", (width, head_dim))
    yield Tensor(attn + "A_log", (heads,), gain=0.0, dtype="float32")
    # A tenth of the state is forgotten at each token.
    yield Tensor(attn + "dt_bias", (width,), gain=None, dtype="float32", constant=-4.0)
    yield Tensor(attn + "o_norm.weight", (head_dim,), gain=None)
    yield Tensor(attn + "o_proj.weight", (hidden, width))
