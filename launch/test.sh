#!/usr/bin/env bash
# Installs the test extra into .venv, then lints, checks types and runs the tests. Safe to run again.
#
#   launch/test.sh            all but the tests marked `long`: under 20 minutes on two cores; what CI runs
#   launch/test.sh --quick    without those that train, start processes or compile much: under 4 minutes
#   launch/test.sh --all      every test: an hour and a quarter
#
# Further arguments go to pytest, such as -k sampler.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

slow_files="tests/test_algorithm_goldens.py tests/test_algorithm_runs.py tests/test_algorithms.py tests/test_another_recipe.py
tests/test_archive.py tests/test_bench.py tests/test_checkpoint.py tests/test_coverage.py
tests/test_damaged_checkpoints.py tests/test_demo.py tests/test_dpo.py tests/test_endpoint.py tests/test_evaluate.py
tests/test_export.py tests/test_kernels.py tests/test_kinds_of_runs.py tests/test_launch.py tests/test_locks.py
tests/test_lora.py tests/test_lora_runs.py tests/test_on_policy.py tests/test_optimizer.py tests/test_ordinal.py tests/test_outputs.py
tests/test_policy_runs.py tests/test_processes.py tests/test_programs.py tests/test_real_inputs.py tests/test_recipes.py
tests/test_report.py tests/test_reward_model.py tests/test_reward_settings.py tests/test_rewardbench.py tests/test_rubric_arm.py
tests/test_ruled.py tests/test_same_weights.py
tests/test_sampler.py tests/test_scalar.py tests/test_steps.py tests/test_thinking.py tests/test_transformer.py
tests/test_weights.py"
long_files=$(grep -rlE "mark\.long" tests --include=*.py | sort | tr '\n' ' ')
select=(-m "not long")
left_out="tests marked long, which --all runs, in $long_files"
case "${1:-}" in
  --quick)
    shift
    for file in $slow_files; do select+=("--ignore=$file"); done
    left_out="$left_out and all of ${slow_files//$'\n'/ }"
    ;;
  --all)
    shift
    select=(--hypothesis-profile search)
    left_out=nothing
    ;;
esac

install test
ruff check .
ruff format --check .
mypy
echo "left out: $left_out"
# Each worker has half of the files in a row, and takes from the other's end when it has none left: what a file
# builds once for all of its tests, such as a trained judge, is then built by one worker and not by both.
exec pytest --numprocesses 2 --dist worksteal "${select[@]}" "$@"
