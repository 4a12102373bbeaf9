# SPDX-License-Identifier: Apache-2.0
"""Config and tensors of each family of DSA models, with few layers and the shapes of one tensor-parallel rank of 8.

What TP splits (attention heads, MLP widths, vocabulary) is an eighth, what it replicates (the indexer, the latent
projections, the norms) is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TP_SIZE = 8
FP8_BLOCK = 128
# Of every FP8 block. Weights are about 1 / sqrt(inputs): divided by this, in the middle of e4m3's range.
FP8_SCALE = 2.0**-8


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `shape`, `dtype` (PyTorch's name), and how it is filled.

    gain: standard deviation of `x @ w.T` for unit-variance `x`. None: all `constant` (a norm's weight).
    alike: draws the numbers of the tensor of this name (the MTP layer shares embedding and head).
    below: instead of all that, each row holds different integers less than this (experts).
    """

    name: str
    shape: tuple[int, ...]
    gain: float | None = 1.0
    dtype: str = "bfloat16"
    alike: str | None = None
    constant: float = 1.0
    below: int | None = None


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
    yield [
        Tensor("model.embed_tokens.weight", (vocab, hidden), gain=hidden**0.5),
        Tensor("model.norm.weight", (hidden,), gain=None),
        Tensor("lm_head.weight", (vocab, hidden)),
    ]
    for layer in range(layers):
        yield list(_v32_layer(config, layer))
    # The MTP layer is stored as one layer more, with its own copy of embedding and head.
    prefix = f"model.layers.{layers}."
    yield [
        *_v32_layer(config, layers),
        Tensor(prefix + "enorm.weight", (hidden,), gain=None),
        Tensor(prefix + "hnorm.weight", (hidden,), gain=None),
        Tensor(prefix + "eh_proj.weight", (hidden, 2 * hidden)),
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
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    q_rank, kv_rank, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, v_dim = c["qk_nope_head_dim"], c["v_head_dim"]
    index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]

    yield Tensor(prefix + "input_layernorm.weight", (hidden,), gain=None)
    yield Tensor(prefix + "post_attention_layernorm.weight", (hidden,), gain=None)

    attn = prefix + "self_attn."
    yield Tensor(attn + "q_a_proj.weight", (q_rank, hidden))
    yield Tensor(attn + "q_a_layernorm.weight", (q_rank,), gain=None)
    yield Tensor(attn + "q_b_proj.weight", (heads * (nope + rope), q_rank))
    yield Tensor(attn + "kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden))
    yield Tensor(attn + "kv_a_layernorm.weight", (kv_rank,), gain=None)
    yield Tensor(attn + "kv_b_proj.weight", (heads * (nope + v_dim), kv_rank))
    # Averaging over many keys shrinks the values; this keeps the context's part in the residual large.
    yield Tensor(attn + "o_proj.weight", (hidden, heads * v_dim), gain=3.0)

    if has_indexer(config, layer):
        indexer = attn + "indexer."
        yield Tensor(indexer + "wq_b.weight", (index_heads * index_dim, q_rank))
        yield Tensor(indexer + "wk.weight", (index_dim, hidden))
        yield Tensor(indexer + "k_norm.weight", (index_dim,), gain=None, dtype="float32")
        yield Tensor(indexer + "k_norm.bias", (index_dim,), gain=0.0, dtype="float32")
        yield Tensor(indexer + "weights_proj.weight", (index_heads, hidden))

    mlp = prefix + "mlp."
    if layer < c["first_k_dense_replace"]:
        yield from _mlp(mlp, hidden, c["intermediate_size"])
        return
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    yield Tensor(mlp + "gate.weight", (experts, hidden))
    yield Tensor(mlp + "gate.e_score_correction_bias", (experts,), gain=0.0, dtype="float32")
    yield from _mlp(mlp + "shared_experts.", hidden, width * c["n_shared_experts"])
    for expert in range(experts):
        yield from _mlp(f"{mlp}experts.{expert}.", hidden, width)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield Tensor(prefix + "gate_proj.weight", (width, hidden))
    yield Tensor(prefix + "up_proj.weight", (width, hidden))
    yield Tensor(prefix + "down_proj.weight", (hidden, width))


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
        Tensor("embed.weight", (vocab, hidden), gain=hidden**0.5),
        Tensor("norm.weight", (hidden,), gain=None),
        Tensor("head.weight", (vocab, hidden)),
        *_hyper_connection("hc_head", config, mixes=config["hc_mult"], scales=1),
    ]
    for layer in range(config["num_hidden_layers"]):
        yield list(_v4_layer(config, f"layers.{layer}.", layer))
    prefix = "mtp.0."
    yield [
        *_v4_layer(config, prefix, config["num_hidden_layers"]),
        Tensor(prefix + "enorm.weight", (hidden,), gain=None),
        Tensor(prefix + "hnorm.weight", (hidden,), gain=None),
        *_fp8(prefix + "e_proj", (hidden, hidden)),
        *_fp8(prefix + "h_proj", (hidden, hidden)),
        Tensor(prefix + "emb.tok_emb.weight", (vocab, hidden), gain=hidden**0.5, alike="embed.weight"),
        Tensor(prefix + "norm.weight", (hidden,), gain=None),
        Tensor(prefix + "head.weight", (vocab, hidden), alike="head.weight"),
        *_hyper_connection(prefix + "hc_head", config, mixes=config["hc_mult"], scales=1),
    ]


def _v4_layer(config: dict[str, Any], prefix: str, layer: int) -> Iterator[Tensor]:
    c = config
    hidden, heads, head_dim, groups = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["o_groups"]
    q_rank, o_rank, ratio = c["q_lora_rank"], c["o_lora_rank"], c["compress_ratios"][layer]
    index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]

    for part in "attn", "ffn":
        yield Tensor(f"{prefix}{part}_norm.weight", (hidden,), gain=None)
        # For each stream: how much of it goes in, of the result comes back, and of every stream stays.
        mixes = (2 + c["hc_mult"]) * c["hc_mult"]
        yield from _hyper_connection(f"{prefix}hc_{part}", config, mixes, scales=3)

    attn = prefix + "attn."
    yield Tensor(attn + "attn_sink", (heads,), gain=0.0, dtype="float32")
    yield from _fp8(attn + "wq_a", (q_rank, hidden))
    yield Tensor(attn + "q_norm.weight", (q_rank,), gain=None)
    yield from _fp8(attn + "wq_b", (heads * head_dim, q_rank))
    yield from _fp8(attn + "wkv", (head_dim, hidden))
    yield Tensor(attn + "kv_norm.weight", (head_dim,), gain=None)
    yield from _fp8(attn + "wo_a", (groups * o_rank, heads * head_dim // groups))
    # As the o_proj of DeepSeek-V3.2.
    yield from _fp8(attn + "wo_b", (hidden, groups * o_rank), gain=3.0)
    if ratio:
        yield from _compressor(attn + "compressor.", hidden, head_dim, ratio)
    if ratio == 4:
        indexer = attn + "indexer."
        yield from _fp8(indexer + "wq_b", (index_heads * index_dim, q_rank))
        yield Tensor(indexer + "weights_proj.weight", (index_heads, hidden))
        yield from _compressor(indexer + "compressor.", hidden, index_dim, ratio)

    ffn = prefix + "ffn."
    experts, width, chosen = c["n_routed_experts"], c["moe_intermediate_size"], c["num_experts_per_tok"]
    yield Tensor(ffn + "gate.weight", (experts, hidden))
    if layer < c["num_hash_layers"]:
        yield Tensor(ffn + "gate.tid2eid", (c["vocab_size"], chosen), dtype="int64", below=experts)
    else:
        yield Tensor(ffn + "gate.bias", (experts,), gain=0.0, dtype="float32")
    yield from _fp8_mlp(ffn + "shared_experts.", hidden, width * c["n_shared_experts"])
    for expert in range(experts):
        yield from _fp8_mlp(f"{ffn}experts.{expert}.", hidden, width)


def _hyper_connection(prefix: str, config: dict[str, Any], mixes: int, scales: int) -> Iterator[Tensor]:
    """What mixes the `hc_mult` residual streams: a product with all of them makes the `mixes` factors."""
    yield Tensor(prefix + "_fn", (mixes, config["hc_mult"] * config["hidden_size"]), dtype="float32")
    yield Tensor(prefix + "_base", (mixes,), gain=0.0, dtype="float32")
    yield Tensor(prefix + "_scale", (scales,), gain=None, dtype="float32")


def _compressor(prefix: str, hidden: int, head_dim: int, ratio: int) -> Iterator[Tensor]:
    """What makes one key of `ratio` tokens; with ratio 4 of 8, half of them also in the key before."""
    width = head_dim * 2 if ratio == 4 else head_dim
    yield Tensor(prefix + "wkv.weight", (width, hidden))
    yield Tensor(prefix + "wgate.weight", (width, hidden))
    yield Tensor(prefix + "ape", (ratio, width), dtype="float32")
    yield Tensor(prefix + "norm.weight", (head_dim,), gain=None)


def _fp8_mlp(prefix: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield from _fp8(prefix + "w1", (width, hidden))
    yield from _fp8(prefix + "w2", (hidden, width))
    yield from _fp8(prefix + "w3", (width, hidden))


def _fp8(name: str, shape: tuple[int, int], gain: float = 1.0) -> Iterator[Tensor]:
    """An FP8 matrix and the float32 scales of its blocks."""
    rows, columns = shape
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    yield Tensor(name + ".weight", shape, gain / FP8_SCALE, "float8_e4m3fn")
    yield Tensor(name + ".scale", blocks, None, "float32", constant=FP8_SCALE)


@dataclass(frozen=True)
class Architecture:
    """How one family of DSA models is laid out on disk.

    released: the model it is after, in words.
    config: config.json's content for a number of layers (the MTP layer comes on top) and of experts per layer.
    shards: the tensors of such a config, one list per file.
    """

    released: str
    config: Callable[[int, int], dict[str, Any]]
    shards: Callable[[dict[str, Any]], Iterator[list[Tensor]]]


ARCHITECTURES = {
    "v32": Architecture("DeepSeek-V3.2", v32_config, v32_shards),
    "glm": Architecture("GLM-5.2, whose layers share indexers", glm_config, v32_shards),
    "v4": Architecture("DeepSeek-V4-Flash-Base, with FP8 experts", v4_config, v4_shards),
}
