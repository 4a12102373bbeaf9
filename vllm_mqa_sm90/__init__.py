# SPDX-License-Identifier: Apache-2.0
"""Paged MQA logits of DeepSeek Sparse Attention's indexer on Hopper, for up to eight query rows a group."""

from vllm_mqa_sm90.ops import (
    HEAD_DIM,
    HEADS,
    MAX_NEXT_N,
    PAGE_SIZES,
    launch_counts,
    paged_mqa_logits,
    plan,
    plan_shape,
    row_context_lens,
)

__all__ = [
    "HEADS",
    "HEAD_DIM",
    "MAX_NEXT_N",
    "PAGE_SIZES",
    "launch_counts",
    "paged_mqa_logits",
    "plan",
    "plan_shape",
    "row_context_lens",
]
