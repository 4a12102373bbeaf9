#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets everything up in .venv and runs `vllm-mqa-sm90 demo`: with an SM90 GPU it serves a small model through vLLM,
# without one it checks the kernel's schedule on the CPU. Arguments go to the demo.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
unset PYTHONPATH

command -v "${CXX:-g++}" >/dev/null || fail "found no C++ compiler: install g++ (Debian, Ubuntu: apt-get install g++)"
if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -qx 9.0; then
  packages=("vllm==0.26.0") size=14
  need_disk "${TMPDIR:-/tmp}" 5 "the demo's checkpoint"
  # Triton compiles against Python's headers.
  condition='os.path.exists(sysconfig.get_path("include") + "/Python.h")'
else
  packages=("torch>=2.11" numpy) size=8
  condition=True
fi
echo "setting up .venv with ${packages[*]}; a first time takes minutes"
need_disk . "$size" "the set-up"

mkdir -p .venv
trap 'rm -rf .venv/setup' EXIT
mkdir -p .venv/setup
python=$(find_python 10 "$condition") || python=
export UV_CACHE_DIR=$PWD/.venv/setup/cache UV_PYTHON_INSTALL_DIR=$PWD/.venv/python PIP_NO_CACHE_DIR=1
uv=$(find_uv "$PWD/.venv/setup" "$python") ||
  fail "found neither uv nor a Python from 3.10 to 3.13 with pip: install one of them"
# Without a suitable Python, uv downloads one.
[ -x .venv/bin/python ] || "$uv" venv -q --allow-existing --seed --python "${python:-3.12}" .venv ||
  fail "could not make .venv with ${python:-a Python 3.12 that uv downloads}, see above (a Python: install python3.12 and python3.12-dev)"
"$uv" pip install --python .venv/bin/python "${packages[@]}"
# pip, not uv: its isolated build sees the PyTorch and nvcc that .venv has.
.venv/bin/python -m pip install -q --disable-pip-version-check --force-reinstall --no-deps .
"$uv" pip install -q --python .venv/bin/python rich
rm -rf .venv/setup

exec .venv/bin/vllm-mqa-sm90 demo "$@"
