# SPDX-License-Identifier: Apache-2.0
"""Folders of which vLLM configures a made model, for tests that load no weights."""

import json
from pathlib import Path
from typing import Any

from vllm_mqa_sm90.architectures import text
from vllm_mqa_sm90.checkpoint import make_tokenizer


def write_weightless(folder: Path, config: dict[str, Any]) -> None:
    """config.json, and the tokenizer that goes with it."""
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(text(config)["vocab_size"]).save_pretrained(folder)
