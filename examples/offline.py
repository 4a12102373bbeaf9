# SPDX-License-Identifier: Apache-2.0
"""The same as serve.sh without a server: `LLM(...)` with the plugin and two speculative tokens.

    python examples/offline.py deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8
    python examples/offline.py DIR      # DIR: written by `vllm-mqa-sm90 make-checkpoint DIR`
"""

import argparse
import os
from pathlib import Path

# Before vLLM starts its workers, which read it: no answer unless the plugin takes over.
os.environ.setdefault("MQA_SM90", "require")

from vllm import LLM, SamplingParams

from vllm_mqa_sm90.checkpoint import ACCEPTANCE_RATES, has_random_weights

PROMPTS = ["Native decoding on Hopper:", "def fibonacci(n: int) -> int:\n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or folder")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=16384)
    args = parser.parse_args()

    speculative = {"method": "mtp", "num_speculative_tokens": 2}
    if has_random_weights(Path(args.model)):
        # Random weights draft at random: vLLM accepts these shares of the drafts, whatever they are.
        speculative |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": ACCEPTANCE_RATES[:2]}
    llm = LLM(
        model=args.model,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
        speculative_config=speculative,
        disable_log_stats=False,  # else llm.get_metrics() is empty
    )
    for answer in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)):
        print(f"{answer.prompt!r} -> {answer.outputs[0].text!r}")
    counters = {metric.name: metric for metric in llm.get_metrics()}
    drafts = counters["vllm:spec_decode_num_drafts"].value
    accepted = counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    print("drafts accepted up to each position:", ", ".join(f"{count / drafts:.1%}" for count in accepted))


if __name__ == "__main__":
    main()
