#!/usr/bin/env bash
# Makes the peers' environments in .venv-peers/; needs Python 3.11. Ours is .venv, made by launch/demo.sh or test.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3.11}
for peer in torch tunix verl; do
  [ -x ".venv-peers/$peer/bin/python" ] || "$python" -m venv ".venv-peers/$peer"
done
.venv-peers/torch/bin/pip install --quiet "torch==2.13.0" transformers "trl==1.16.0" datasets accelerate
.venv-peers/tunix/bin/pip install --quiet "google-tunix==0.1.7"
.venv-peers/verl/bin/pip install --quiet "torch==2.13.0" "verl==0.9.1"
for peer in torch tunix verl; do  # what an adapter needs to ask a judge behind an endpoint; no JAX
  ".venv-peers/$peer/bin/pip" install --quiet httpx2 tenacity msgspec pyyaml tqdm
done
