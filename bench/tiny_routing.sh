#!/usr/bin/env bash
# Writes the tables of bench/results/tiny-routing.md: what policies and predictor are worth on the routing of the
# tiny trained model, over text it was not trained on. Takes about a minute on two cores.
# Usage: bench/tiny_routing.sh [LIGHTER]     (default: build/release/lighter)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
lighter=${1:-$root/build/release/lighter}
page=$root/bench/results/tiny-routing.md
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Everything resident: where the experts lie changes nothing about the routing.
"$lighter" trace "$root/configs/demo.yaml" --text "$root/models/tiny/heldout.txt" --out "$scratch/heldout.trace" \
  --set memory.context=1024 --set offload.resident=1.0 --set memory.gpu_budget=64MiB
"$lighter" replay "$scratch/heldout.trace" --resident 0.33 --resident 0.5 --resident 0.67 >"$scratch/table"

[[ $(grep -c '^<!-- tables: ' "$page") == 2 ]] || { echo "tiny_routing.sh: $page has lost its marks" >&2; exit 1; }
{
  sed '/^<!-- tables: begin/q' "$page"
  echo
  cat "$scratch/table"
  echo
  sed -n '/^<!-- tables: end/,$p' "$page"
} >"$scratch/page"
cp "$scratch/page" "$page"
