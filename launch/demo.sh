#!/usr/bin/env bash
# Installs into .venv and runs the demo: a small judge learns from preference pairs, on this machine, in minutes.
# Arguments go to `patarm demo`, such as --out runs/other --seed 1. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh
install ''
exec patarm demo "$@"
