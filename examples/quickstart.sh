#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets everything up in .venv and runs `vllm-mqa-sm90 demo`: with an SM90 GPU it serves a small model through vLLM,
# without one it checks the kernel's schedule on the CPU. Arguments go to the demo.
#
# A set-up that was stopped, at any point, goes on at the next run; one that is complete is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
trap 'echo "quickstart.sh: stopped; run it again, and it goes on from here" >&2; exit 130' INT
unset PYTHONPATH

if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -qx 9.0; then
  packages="vllm==0.26.0" size=14
  need_disk "${TMPDIR:-/tmp}" 5 "the demo's checkpoint"
  # Triton compiles against Python's headers.
  condition='os.path.exists(sysconfig.get_path("include") + "/Python.h")'
else
  packages="torch>=2.11" size=8
  condition=True
fi

set_up() {
  local begun=.venv/setup again=() part python uv
  command -v "${CXX:-g++}" >/dev/null || fail "found no C++ compiler: install g++ (Debian, Ubuntu: apt-get install g++)"
  echo "setting up .venv with $packages; a first time takes minutes"
  rm -f .venv/ready
  if [ -e "$begun/installing" ]; then
    # A stopped installer may leave packages in part, which count as installed for as long as they have this folder.
    for part in .venv/lib/python3*/site-packages/*.dist-info; do
      if [ "$part" -nt "$begun/installing" ]; then
        rm -rf "$part"
        again+=("$(basename "$part" .dist-info)")
      fi
    done
    [ ${#again[@]} -eq 0 ] || echo "a set-up was stopped while it installed; installing once more: ${again[*]}"
    rm "$begun/installing"
  fi
  mkdir -p "$begun"
  need_disk . $((size - $(du -sk .venv | cut -f 1) / 1024 / 1024)) "the set-up"

  python=$(find_python 10 "$condition") || python=
  # Downloads stay until all is done.
  export UV_CACHE_DIR=${UV_CACHE_DIR:-$PWD/$begun/cache} PIP_CACHE_DIR=$PWD/$begun/pip UV_PYTHON_INSTALL_DIR=$PWD/.venv/python
  uv=$(find_uv "$PWD/$begun" "$python") || fail_uv "$begun"
  # A .venv of others is used as it is, but what is not one would have us install into the Python that made it.
  if ! .venv/bin/python -c 'import os, sys; assert os.path.samefile(sys.prefix, ".venv")' 2>/dev/null; then
    # Without a suitable Python, uv downloads one.
    "$uv" venv -q --allow-existing --python "${python:-3.12}" .venv ||
      fail "could not make .venv with ${python:-a Python 3.12 that uv downloads: offline?}, see above" \
        "(a Python: install python3.12 and python3.12-dev)"
  elif ! suits .venv/bin/python 10 "$condition"; then
    fail ".venv has $(.venv/bin/python --version), expected Python 3.10 to 3.13, with a GPU also its headers" \
      "(python3.12-dev): remove .venv, or move it away, and run this again"
  fi
  install pip "$packages"
  # pip, not uv: its isolated build sees the PyTorch and nvcc that .venv has.
  echo "compiling the kernel, about a minute on two cores"
  rm -rf "$begun/wheel"
  rm -rf "$begun"/tmp.* 2>/dev/null || true # compilers of a killed run may still write there
  TMPDIR=$(mktemp -d "$PWD/$begun/tmp.XXXXXX") .venv/bin/python -m pip wheel -q --disable-pip-version-check --no-deps -w "$begun/wheel" . ||
    fail_download "$uv" "the build"
  install -q --reinstall-package vllm-mqa-sm90 "$begun"/wheel/*.whl
  echo "$wanted" >.venv/ready
  rm -rf "$begun" || true
}

# install ARGUMENT ...: of `uv pip install`, into .venv.
install() {
  touch "$begun/installing"
  "$uv" pip install --python .venv/bin/python "$@" || fail_download "$uv" "installing $packages"
  rm "$begun/installing"
}

# What .venv/ready has once all is there: the packages, and the sources that were built.
wanted="$packages $(find pyproject.toml csrc vllm_mqa_sm90 -type f -not -name '*.so' -not -name '*.pyc' \
  -exec sha256sum {} + | sort | sha256sum)"
if [ "$(cat .venv/ready 2>/dev/null)" != "$wanted" ] || ! .venv/bin/vllm-mqa-sm90 --version >/dev/null 2>&1; then
  set_up
fi
exec .venv/bin/vllm-mqa-sm90 demo "$@"
