# SPDX-License-Identifier: Apache-2.0
"""Config and tensors of each family of DSA models, with few layers and the shapes of one tensor-parallel rank of 8.

What TP splits (attention heads, MLP widths, vocabulary) is an eighth, what it replicates (the indexer, the latent
projections, the norms) is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_mqa_sm90.architectures.deepseek_v4 import v4_config, v4_shards
from vllm_mqa_sm90.architectures.deepseek_v32 import glm_config, has_indexer, v32_config, v32_shards
from vllm_mqa_sm90.architectures.deepseek_v41 import v41_config, v41_shards
from vllm_mqa_sm90.architectures.glm53 import glm53_config, glm53_shards
from vllm_mqa_sm90.architectures.hy_v4 import hyv4_config, hyv4_shards
from vllm_mqa_sm90.architectures.tensors import Tensor

__all__ = ["ARCHITECTURES", "Architecture", "Tensor", "has_indexer", "text", "v32_config"]


@dataclass(frozen=True)
class Architecture:
    """How one family of DSA models is laid out on disk.

    released: the model it is after, in words.
    config: config.json's content for a number of layers (the drafter's come on top) and of experts per layer.
    shards: the tensors of such a config, one list per file.
    since: the first vLLM that has it, of those that the plugin knows.
    method: of its drafter, in vLLM's --speculative-config.
    arguments: what `vllm serve` needs to be told of it.
    """

    released: str
    config: Callable[[int, int], dict[str, Any]]
    shards: Callable[[dict[str, Any]], Iterator[list[Tensor]]]
    since: tuple[int, int] = (0, 24)
    method: str = "mtp"
    arguments: tuple[str, ...] = ()


def text(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that is the language model's."""
    return config.get("text_config", config)


ARCHITECTURES = {
    "v32": Architecture("DeepSeek-V3.2", v32_config, v32_shards),
    "glm": Architecture("GLM-5.2, whose layers share indexers", glm_config, v32_shards),
    "v4": Architecture("DeepSeek-V4-Flash-Base, with FP8 experts", v4_config, v4_shards),
    "v41": Architecture(
        "DeepSeek-V4.1-Flash, with FP8 experts and DSpark (to serve with --language-model-only)",
        v41_config,
        v41_shards,
        since=(0, 30),
        method="dspark",
        arguments=("--language-model-only",),
    ),
    "glm53": Architecture("GLM-5.3-Flash", glm53_config, glm53_shards, since=(0, 30)),
    "hyv4": Architecture("Hy4-preview", hyv4_config, hyv4_shards, since=(0, 29)),
}
