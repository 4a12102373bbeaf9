#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs tests/soak.py, in small steps, under tools of compute-sanitizer, by default all four:
#   bash tests/sanitize.sh [memcheck|initcheck|synccheck|racecheck ...]
# Each begins no step after LIMIT seconds (60), nor more than STEPS (2000) from SEED (0) on. PYTHON (python) has PyTorch.
# A line for each tool; logs are in build/sanitize, and name a step's seed before what was found in it.
# Exit status: 0 nothing found, 1 something found or a tool that did not run, 2 wrong usage.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
tools=("$@")
[ $# -gt 0 ] || tools=(memcheck initcheck synccheck racecheck)
for tool in "${tools[@]}"; do
  if [[ $tool != @(memcheck|initcheck|synccheck|racecheck) ]]; then
    echo "sanitize.sh: expected memcheck, initcheck, synccheck or racecheck, given $tool" >&2
    exit 2
  fi
done
sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer) || {
  echo "sanitize.sh: found no compute-sanitizer in PATH or CUDA_HOME/bin: it comes with the CUDA toolkit" >&2
  exit 1
}
mkdir -p build/sanitize

# racecheck's library (shared/hopper.cuh: MQA_SM90_RACECHECK) is built from copies in build/racecheck, beside the package's
# Python, and used as it is while csrc is what it was made of: also where there is nothing to build with.
racecheck_library() {
  local tree=build/racecheck library=build/racecheck/vllm_mqa_sm90/_C.abi3.so
  mkdir -p "$tree/build"
  if ! { [ -f "$library" ] && diff -rq -x __pycache__ -x '*.md' -x '*.svg' csrc "$tree/csrc"; } >/dev/null 2>&1; then
    rm -rf "$library" "$tree/csrc"
    cp -a csrc "$tree/csrc"
    [ ! -d build/headers ] || ln -sfn ../../headers "$tree/build/headers"
    NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -DMQA_SM90_RACECHECK" "$python" "$tree/csrc/build.py" || return 1
  fi
  tar --exclude=_C.abi3.so --exclude=__pycache__ -cf - vllm_mqa_sm90 | tar -xf - -C "$tree"
}

# Without PyTorch's cache every tensor is an allocation of its own, whose bounds and first writes the tools see.
# initcheck must see the writes of all kernels, PyTorch's too, so it has no filter: what it finds in those is not counted.
sanitize() {
  local tool=$1 log=build/sanitize/$1.log package=$PWD status=0 found="" soaked summary
  local options=(--tool "$tool") soak=(--small --verbose --steps "${STEPS:-2000}" --seconds "${LIMIT:-60}" --seed "${SEED:-0}")
  local environment=(PYTHONUNBUFFERED=1)
  case $tool in
    initcheck) options+=(--show-backtrace no --print-limit 0) soak+=(--run-only) ;;
    *) options+=(--kernel-name kns=mqa_sm90 --error-exitcode 9) ;;
  esac
  case $tool in
    # Errors that PyTorch asks for, to see what a driver has; those of our launches are exceptions.
    memcheck) options+=(--report-api-errors no) environment+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;;
    initcheck) environment+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;;
    racecheck)
      if ! racecheck_library >"$log" 2>&1; then
        echo "racecheck: did not run: its library cannot be built, see $log"
        return 1
      fi
      package=$PWD/build/racecheck
      ;;
  esac
  # Where the tree is not built, the installed package.
  [ ! -f "$package/vllm_mqa_sm90/_C.abi3.so" ] || environment+=("PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH}")
  env "${environment[@]}" "$sanitizer" "${options[@]}" "$python" tests/soak.py "${soak[@]}" >"$log" 2>&1 || status=$?

  soaked=$(grep -E '^[0-9]+ steps from seed ' "$log" | tail -n 1) || soaked="the soak did not end"
  summary=$(grep -Eo '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -n 1) || summary="no summary"
  if [ "$tool" = initcheck ]; then
    found=$(grep -cE '^=+ +at .*mqa_sm90' "$log") || true
    summary="$found in our kernels ($summary in all)"
    [ "$found" = 0 ] || status=9
  elif ! [[ $summary =~ SUMMARY:\ 0\  ]]; then
    status=9
  fi
  if [ "$status" = 0 ] && [[ $soaked == *", 0 wrong, "* && $summary == *SUMMARY* ]]; then
    echo "$tool: found nothing: $soaked; $summary"
  else
    echo "$tool: FOUND SOMETHING or did not run, see $log: $soaked; $summary"
    return 1
  fi
}

result=0
for tool in "${tools[@]}"; do
  sanitize "$tool" || result=1
done
exit "$result"
