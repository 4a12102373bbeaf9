#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets everything up in a temporary folder, removed at the end, and runs all tests under each vLLM of VLLM_VERSIONS.
# Tests that need an SM90 GPU are deselected where there is none. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
unset PYTHONPATH CUDA_HOME

read -ra versions <<<"${VLLM_VERSIONS:-0.26.0 0.33.0}"
command -v "${CXX:-g++}" >/dev/null || fail "found no C++ compiler: install g++ (Debian, Ubuntu: apt-get install g++)"
python=$(find_python 11 True) || fail "found no Python from 3.11 to 3.13: install one (vLLM 0.33 needs 3.11)"

# A killed run leaves gigabytes, which nobody holds the lock of.
for left in "${TMPDIR:-/tmp}"/mqa-sm90-tests.*/lock; do
  if [ -e "$left" ] && flock -n "$left" true; then
    rm -rf "$(dirname "$left")"
  fi
done
need_disk "${TMPDIR:-/tmp}" 15 "one vLLM at a time"

scratch=$(mktemp -d "${TMPDIR:-/tmp}/mqa-sm90-tests.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
exec {lock}>"$scratch/lock"
flock "$lock"
export UV_CACHE_DIR=$scratch/cache PYTHONDONTWRITEBYTECODE=1
uv=$(find_uv "$scratch" "$python") || fail_uv "$scratch"
echo "Python $python, uv $uv"

# The build with nothing but wheels: an nvcc that fails hides any other on PATH.
mkdir "$scratch/hidden"
printf '#!/bin/sh\nexit 1\n' >"$scratch/hidden/nvcc"
chmod +x "$scratch/hidden/nvcc"
rm -rf build
echo "building the wheel: headers and a compiler to download, then a minute of compiling on two cores"
PATH=$scratch/hidden:$PATH "$uv" build -q --wheel --python "$python" --out-dir "$scratch/wheel" ||
  fail_download "$uv" "the build"
[[ $(readlink build/tools/cuda) == */nvidia/cu13 ]] || fail "the build did not use the nvcc of the wheels"
wheel=$(echo "$scratch"/wheel/*.whl)

# certifi: vLLM 0.33 asks for a release that an index may not have yet.
# cuda-bindings: the last release with the module that the CUTLASS DSL of vLLM 0.33 imports.
printf 'certifi\ncuda-bindings==13.4.4\n' >"$scratch/override.txt"
status=0
for version in "${versions[@]}"; do
  echo "vLLM $version"
  override=()
  [[ $version == 0.26.* ]] || override=(--override "$scratch/override.txt")
  venv=$scratch/$version
  "$uv" venv -q --python "$python" "$venv"
  "$uv" pip install -q --python "$venv/bin/python" "${override[@]}" "vllm==$version" "$wheel[test]" ||
    fail_download "$uv" "installing vLLM $version"
  # The script, not `python -m`: the latter would import the source tree instead of the wheel.
  "$venv/bin/pytest" -p no:cacheprovider "$@" 2>&1 | tee "$scratch/$version.log" || status=1
  rm -rf "$venv" "$UV_CACHE_DIR"
done

for version in "${versions[@]}"; do
  tail -n 1 "$scratch/$version.log"
done
exit "$status"
