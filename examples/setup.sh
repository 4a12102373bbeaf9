# SPDX-License-Identifier: Apache-2.0
# Sourced by quickstart.sh and tests/run.sh: finds a Python, uv and enough disk, or says what is missing.

trap 'exit 130' INT # also where the command that Ctrl-C stopped ends with another status

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# need_disk DIRECTORY GB WHAT
need_disk() {
  local free
  free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
  [ "$free" -ge "$2" ] || fail "$3 needs $2 GB of disk in $1, where $free GB are free"
}

# suits PYTHON MINOR CONDITION: whether it is a Python from 3.MINOR to 3.13 for which the expression holds.
suits() {
  "$1" -c "
import os, sys, sysconfig
assert (3, $2) <= sys.version_info[:2] <= (3, 13) and ($3)" 2>/dev/null
}

# find_python MINOR CONDITION: prints the first that suits.
find_python() {
  local candidate
  for candidate in python3.1{2,3,1,0} python3 python ~/.pyenv/versions/3.1*/bin/python; do
    if suits "$candidate" "$@"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

# find_uv DIRECTORY PYTHON: prints a uv, put into DIRECTORY if need be by PYTHON's pip, a venv's, or uv's installer.
find_uv() {
  local get=(install -q --no-cache-dir --disable-pip-version-check --target "$1" uv)
  # A version manager's stand-in for the uv of another Python is found, too, and fails.
  uv --version >/dev/null 2>&1 && command -v uv && return
  if [ -n "$2" ] && "$2" -m pip "${get[@]}"; then
    :
  elif [ -n "$2" ] && "$2" -m venv "$1/venv"; then
    "$1/venv/bin/pip" "${get[@]}"
  else
    curl -LsSf https://astral.sh/uv/install.sh | UV_UNMANAGED_INSTALL="$1/bin" sh
  fi >"$1/uv.log" 2>&1
  [ -x "$1/bin/uv" ] && echo "$1/bin/uv"
}

# fail_uv DIRECTORY: after find_uv.
fail_uv() {
  cat "$1/uv.log" >&2
  fail "could not download uv, see above: is this machine offline? Run this again with a network, or install uv," \
    "or a Python from 3.10 to 3.13 with pip"
}

# fail_download UV WHAT: after something that downloads; asks uv whether the package index answers at all.
fail_download() {
  if echo pip | UV_HTTP_RETRIES=0 "$1" pip compile --no-cache --no-deps - >/dev/null 2>&1; then
    fail "$2 failed, see above"
  fi
  fail "this machine is offline, or the package index does not answer: $2 failed, see above. Run this again with a network"
}
