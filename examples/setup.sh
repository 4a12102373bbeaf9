# SPDX-License-Identifier: Apache-2.0
# Sourced by quickstart.sh and tests/run.sh: finds a Python, uv and enough disk, or says what is missing.

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

# find_python MINOR CONDITION: prints the first Python from 3.MINOR to 3.13 for which the expression holds.
find_python() {
  local candidate
  for candidate in python3.1{2,3,1,0} python3 python ~/.pyenv/versions/3.1*/bin/python; do
    "$candidate" -c "
import os, sys, sysconfig
assert (3, $1) <= sys.version_info[:2] <= (3, 13) and ($2)
print(sys.executable)" 2>/dev/null && return
  done
  return 1
}

# find_uv DIRECTORY PYTHON: prints a uv, put into DIRECTORY if need be by PYTHON's pip, a venv's, or uv's installer.
find_uv() {
  local get=(install -q --no-cache-dir --disable-pip-version-check --target "$1" uv)
  command -v uv && return
  if [ -n "$2" ] && "$2" -m pip "${get[@]}"; then
    :
  elif [ -n "$2" ] && "$2" -m venv "$1/venv"; then
    "$1/venv/bin/pip" "${get[@]}"
  else
    curl -LsSf https://astral.sh/uv/install.sh | UV_UNMANAGED_INSTALL="$1/bin" sh
  fi >"$1/uv.log" 2>&1
  [ -x "$1/bin/uv" ] && echo "$1/bin/uv"
}
