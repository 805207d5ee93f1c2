# shellcheck shell=bash
# Sourced by the other scripts: makes .venv if it is missing, installs this checkout into it, and enters it.
#
#   PYTHON       interpreter the environment is made with (default: the first of python3.11, python3, python)
#   VENV         its folder (default: .venv)
#   CONSTRAINTS  versions it is held to (default: launch/constraints.txt; empty: the newest that fit)
#   EXTRAS       installed besides, such as cuda, tpu or wandb

install() {  # install [EXTRA,EXTRA…]
  local extras="$*${*:+${EXTRAS:+,}}${EXTRAS:-}" python=${PYTHON:-} venv=${VENV:-.venv} constraints=${CONSTRAINTS-launch/constraints.txt} candidate
  for candidate in ${python:-python3.11 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
    python=
  done
  if [ -z "$python" ]; then
    echo "Python 3.11 or newer is needed: install it, or name it as PYTHON=/path/to/python3." >&2
    return 1
  fi
  # One without pip was left half-made by a stop, or by a Python without ensurepip.
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 && ! "$python" -m venv --clear "$venv"; then
    echo "$python cannot make environments: on Debian or Ubuntu run apt install python3-venv." >&2
    return 1
  fi
  echo "installing into $venv …" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${constraints:+-c "$constraints"} \
    --editable ".${extras:+[$extras]}"
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
}
