#!/usr/bin/env bash
# Installs the test extra into .venv, then lints, checks types and runs every test. Safe to run again.
# Arguments go to pytest, such as -k sampler.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
install test
ruff check .
ruff format --check .
mypy
exec pytest --numprocesses 2 "$@"
