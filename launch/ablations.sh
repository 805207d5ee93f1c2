#!/usr/bin/env bash
# Compares the paper's choices in the demo's world, on this machine: margins, opponents, rewards, rubrics, group sizes,
# algorithms, pointwise and pairwise judges. Each variant has three seeds; all of them take about three hours on two cores.
#
#   launch/ablations.sh                   everything, in runs/ablations: table.json and a figure for each part
#   launch/ablations.sh --part margins    one part of margins, opponents, loser, reward, rubrics, start, group, algorithms,
#                                         judge; may be given again
#
# Started again, it goes on where it was stopped. Further arguments: --out FOLDER, --seeds N.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh
install ''
exec python -m patarm_jax.demo.ablations "$@"
