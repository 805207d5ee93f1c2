#!/usr/bin/env bash
# One training run on a TPU slice. This runs on every host of the slice, from the checkout's folder there:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all \
#     --command "cd patarm_jax && launch/tpu_pod.sh grpo configs/qwen3_8b_grpo.yaml --run.folder /mnt/shared/run"
#
# What follows the script is a `patarm` command without --mesh.distributed, which is added; `mesh` in the config says how
# many chips stand along data, fsdp and tensor. Code, models and data may lie on each host's own disk, the same on all;
# run.folder must lie on one that all hosts share, such as a Filestore or a mounted bucket.
#
# Log: logs/tpu-HOST.log on each host, which is shown as it grows. The run goes on when the connection is lost. The same
# command resumes a run that was stopped, and one whose slice was taken away and made anew. To stop it, on all hosts:
# `kill -TERM $(cat logs/tpu-HOST.pid)`; Ctrl-C here, where it arrives, does that too. It saves and ends.
#
#   VENV, PYTHON, CONSTRAINTS, EXTRAS   as in launch/venv.sh; EXTRAS is tpu unless set
#   LOGS                                the folder of the log (default: logs)
set -euo pipefail

cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  echo "no command is given: launch/tpu_pod.sh grpo CONFIG.yaml --section.key value …" >&2
  exit 2
fi
host=$(hostname) logs=${LOGS:-logs}
mkdir -p "$logs"
log=$logs/tpu-$host.log mark=$logs/tpu-$host.pid
exec 9>>"$mark" # inherited by the run, and locked as long as it lives
if ! flock --nonblock 9; then
  echo "$host: a run is going on here already, process $(cat "$mark"); its log is $PWD/$log" >&2
  exit 1
fi

# ---- the environment, on every host ---------------------------------------------------------------------------------

venv=${VENV:-.venv} extras=${EXTRAS-tpu} needed="patarm_jax.cli"
case ",$extras," in *,tpu,*) needed="$needed, libtpu" ;; esac
if "$venv/bin/python" -c "import $needed" 2>/dev/null; then
  PATH="$(cd "$venv/bin" && pwd):$PATH"
else
  # shellcheck source=launch/venv.sh
  . launch/venv.sh
  EXTRAS='' install "$extras"
fi
export PATH

# ---- settings, each for a reason ------------------------------------------------------------------------------------

# libtpu overlaps communication with computation, and takes all memory of its chips, without being told.

# A host whose chips are taken by another process fails with the reason, instead of training on its CPUs.
export JAX_PLATFORMS="${JAX_PLATFORMS-tpu,cpu}"
# From v5e on the runtime starts and ends much faster with huge pages, which need root.
pages=/sys/kernel/mm/transparent_hugepage/enabled
case "$JAX_PLATFORMS" in
  tpu*)
    if ! grep -q '\[always\]' "$pages" && ! echo always | sudo -n tee "$pages" >/dev/null; then
      echo "$host: huge pages stay off" >&2
    fi
    ;;
esac

# ---- the run --------------------------------------------------------------------------------------------------------

echo "$host: patarm $* --mesh.distributed auto; its log is $PWD/$log" >&2
touch "$log"
size=$(stat --format=%s "$log")
# In a session of its own: it outlives this connection.
setsid nohup patarm "$@" --mesh.distributed auto >>"$log" 2>&1 </dev/null &
run=$!
echo "$run" >"$mark"
trap 'kill -TERM "$run" 2>/dev/null || true' TERM INT
tail --pid="$run" --bytes="+$((size + 1))" --follow "$log" &
shown=$!
code=0
while wait "$run" || code=$?; kill -0 "$run" 2>/dev/null; do code=0; done # a signal ends a wait before the run ends
wait "$shown" || true
echo "$host: ended with code $code; its log is $PWD/$log" >&2
exit "$code"
