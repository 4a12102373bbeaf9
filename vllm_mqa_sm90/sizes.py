# SPDX-License-Identifier: Apache-2.0
"""What sizes the kernel takes. Apart from `ops`, so that a command's help need not wait for PyTorch."""

HEAD_DIM = 128
"""Elements of one query head, and of the one key head: float8_e4m3fn, so also bytes."""
TOKEN_BYTES = HEAD_DIM + 4
"""A cached token: its key and its float32 scale."""
HEADS = (16, 32, 64)
"""Numbers of query heads that the kernel is compiled for."""
PAGE_SIZES = (32, 64)
"""Tokens per page of the KV cache."""
MAX_TOPK = 2048
"""Most logits of a row that are selected."""
MAX_TOPK_COLUMNS = 1 << 24
"""Longest row of logits to select from: kMaxColumns of csrc/selection/selection.h."""
MAX_NEXT_N = 8
"""Most query rows of one group: those of a request in a uniform step."""
