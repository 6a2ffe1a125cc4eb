#!/usr/bin/env bash
# Times what README's "Measured on one H100" says, and writes bench/results/h100.json.
# Usage: bench/h100.sh LIGHTER [OUT]; needs python3, one 80 GB GPU and 112 GiB of host memory; about 5 minutes.
set -euo pipefail
lighter=$(realpath "$1")
out=$(realpath -m "${2:-bench/results/h100.json}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# A part that fails does not lose the others.
part() {
  echo "== $*" >&2
  "$@" || echo "failed: $*" >&2
}
part "$lighter" calibrate configs/synthetic-scout-int8.yaml
part "$lighter" bench configs/bench-h100.yaml --out "$scratch/decode"
part "$lighter" bench configs/bench-h100-batch.yaml --out "$scratch/batch"
part "$lighter" bench configs/bench-h100-prefill.yaml --out "$scratch/prefill"
part "$lighter" plan configs/synthetic-scout-int8.yaml --json --set model.experts= --set model.format=int8 \
  --set memory.context=8256 --set offload.policy=static --set offload.prefetch.enabled=false --set decode=eager \
  >"$scratch/plan.json"
python3 bench/h100.py "$scratch" "$out"
