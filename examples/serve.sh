#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves a DSA model with the plugin and speculative tokens, the way to run it for others:
#
#   bash examples/serve.sh deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8
#   bash examples/serve.sh DIR      # DIR: written by `vllm-mqa-sm90 make-checkpoint DIR`
#
# Arguments after the model go to `vllm serve`; examples/README.md has a command for each model. Needs this package beside
# vLLM: pip install 'vllm-mqa-sm90[serve]'.
set -euo pipefail
model=${1:?"usage: serve.sh MODEL [VLLM_ARGUMENT ...], MODEL a name or a folder"}
shift

# require: the server does not start unless the plugin takes over. `auto`, the default, would warn and go on without;
# `off` is stock vLLM, to compare with.
export MQA_SM90=${MQA_SM90:-require}

# Draft tokens a step, 0 to 7, from the model's own MTP layer; DeepSeek-V4.1's come from DSpark (of one that is no folder, set
# METHOD). With 2, or 4 and more, stock vLLM reads a request's cached keys once for each token of the step; the plugin, once.
drafts=${DRAFTS:-2}
method=${METHOD:-mtp}
grep -qs '"DeepseekV41ForCausalLM"' "$model/config.json" && method=dspark
speculative='{"method": "'$method'", "num_speculative_tokens": '$drafts

# The random weights of a made checkpoint draft at random, and nothing would be accepted. vLLM's synthetic acceptance
# stands in for a real model's: it accepts these shares of the drafts up to each position, whatever they are.
if grep -qs '"weights": "random"' "$model/model.safetensors.index.json"; then
  rates=(0.813 0.63 0.468 0.325 0.267 0.162 0.124)
  speculative+=', "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": ['
  speculative+=$(IFS=,; echo "${rates[*]:0:drafts}")']'
  [ "$method" != dspark ] || set -- --language-model-only "$@" # it has no vision encoder
fi
[ "$drafts" = 0 ] || set -- --speculative-config "$speculative}" "$@"

# vLLM compiles kernels when it starts, and needs an nvcc for it. Where there is no CUDA toolkit, that of the wheels serves.
if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null; then
  CUDA_HOME=$(python -c 'import nvidia; print(list(nvidia.__path__)[0])')/cu13
  # This nvcc is newer than the headers beside it.
  export CUDA_HOME NVCC_PREPEND_FLAGS=-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK
fi

# Would the plugin take over here? If not, this says why, before the weights are loaded.
[ "$MQA_SM90" != require ] || vllm-mqa-sm90 check

exec vllm serve "$model" "$@"
