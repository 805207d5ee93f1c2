#!/usr/bin/env bash
# Compares the paper's choices in the demo's world, on this machine: margins, opponents, rewards, rubrics, group sizes,
# algorithms, pointwise and pairwise judges. Each variant has three seeds; all of them take at most 2 h 45 min on two cores.
#
#   launch/ablations.sh                   everything, in runs/ablations: table.json and a figure for each part
#   launch/ablations.sh --part margins    one part of margins, opponents, loser, reward, rubrics, start, group, algorithms,
#                                         judge; may be given again
#
#   launch/ablations.sh --part rubric-arm two models, a generator of rubrics and a judge by them, in a world of their own:
#                                         who is trained, in which order; not among everything, and about as long
#
#   launch/ablations.sh --part given-rubrics   a judge of single responses by its own rubrics, by those of such a generator,
#                                         and by both; it makes the generator where the part before has not
#
#   launch/ablations.sh --part policy     what rewards a policy: judges, a reward model, or the pairs themselves by DPO
#
#   launch/ablations.sh --part data       whether it helps to select what is learnt: pairs by a judge's accuracy, judgements by
#                                         their gap
#
#   launch/ablations.sh baselines         reward models, judges and LoRA, with one vote, eight and expected scores; after or
#                                         before the others, with which it shares its runs
#
# Started again, it goes on where it was stopped. Further arguments: --out FOLDER, --seeds N.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh
install ''
if [ "${1:-}" = baselines ]; then
  exec python -m patarm_jax.demo.baselines "${@:2}"
fi
if [ "${1:-} ${2:-}" = "--part given-rubrics" ]; then
  exec python -m patarm_jax.demo.given_rubrics "${@:3}"
fi
if [ "${1:-} ${2:-}" = "--part data" ]; then
  exec python -m patarm_jax.demo.data_ablations "${@:3}"
fi
if [ "${1:-} ${2:-}" = "--part policy" ]; then
  exec python -m patarm_jax.demo.policy_ablations "${@:3}"
fi
if [ "${1:-} ${2:-}" = "--part rubric-arm" ]; then
  exec python -m patarm_jax.demo.arm_ablations "${@:3}"
fi
exec python -m patarm_jax.demo.ablations "$@"
