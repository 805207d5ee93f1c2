#!/usr/bin/env bash
# The same tests on Python 3.12 with the newest releases of everything, jax included, in .venv-newest.
set -euo pipefail
PYTHON=${PYTHON:-python3.12} VENV=.venv-newest CONSTRAINTS='' exec "$(dirname "$0")/test.sh" "$@"
