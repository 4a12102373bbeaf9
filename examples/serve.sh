#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves a DSA model with the plugin and two speculative tokens, the way to run it for others:
#
#   bash examples/serve.sh deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8
#   bash examples/serve.sh DIR      # DIR: written by `vllm-mqa-sm90 make-checkpoint DIR`
#
# Arguments after the model go to `vllm serve`. Needs this package beside vLLM: pip install 'vllm-mqa-sm90[serve]'.
set -euo pipefail
model=${1:?"usage: serve.sh MODEL [VLLM_ARGUMENT ...], MODEL a name or a folder"}
shift

# require: the server does not start unless the plugin takes over. `auto`, the default, would warn and go on without;
# `off` is stock vLLM, to compare with.
export MQA_SM90=${MQA_SM90:-require}

# Two draft tokens a step, from the model's own MTP layer; DeepSeek-V4.1's come from DSpark (of one that is no folder, set METHOD).
# Without the plugin vLLM reads each request's cached keys three times for them; with it, once.
method=${METHOD:-mtp}
grep -qs '"DeepseekV41ForCausalLM"' "$model/config.json" && method=dspark
speculative='{"method": "'$method'", "num_speculative_tokens": 2}'

# The random weights of a made checkpoint draft at random, and nothing would be accepted. vLLM's synthetic acceptance
# stands in for a real model's: it accepts these shares of the drafts up to each position, whatever they are.
if grep -qs '"weights": "random"' "$model/model.safetensors.index.json"; then
  speculative='{"method": "'$method'", "num_speculative_tokens": 2,
    "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.813, 0.63]}'
  [ "$method" != dspark ] || set -- --language-model-only "$@" # it has no vision encoder
fi

# vLLM compiles kernels when it starts, and needs an nvcc for it. Where there is no CUDA toolkit, that of the wheels serves.
if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null; then
  CUDA_HOME=$(python -c 'import nvidia; print(list(nvidia.__path__)[0])')/cu13
  # This nvcc is newer than the headers beside it.
  export CUDA_HOME NVCC_PREPEND_FLAGS=-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK
fi

# Would the plugin take over here? If not, this says why, before the weights are loaded.
[ "$MQA_SM90" != require ] || vllm-mqa-sm90 check

exec vllm serve "$model" --speculative-config "$speculative" "$@"
