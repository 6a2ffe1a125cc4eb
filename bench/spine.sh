#!/usr/bin/env bash
# Times what README's "Measured" says, on one GPU, and writes bench/results/spine.json.
# Usage: bench/spine.sh LIGHTER [OUT]; needs python3 with torch and 125 GiB of host memory; about 5 minutes.
set -euo pipefail
lighter=$1
out=${2:-bench/results/spine.json}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The machine's facts, and its ceiling: page-locked host → device in copies of one slice.
python3 - >"$scratch/machine.json" <<'PY'
import json, subprocess, torch
host = torch.empty(7864320 * 64, dtype=torch.uint8, pin_memory=True).random_(0, 255)
device = torch.empty_like(host, device="cuda")
def rate():
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(64):
        device[i * 7864320:(i + 1) * 7864320].copy_(host[i * 7864320:(i + 1) * 7864320], non_blocking=True)
    end.record(); end.synchronize()
    return host.numel() / begin.elapsed_time(end) / 1e6
rates = sorted(rate() for _ in range(11))
wide = torch.empty(2 << 30, dtype=torch.float32, device="cuda").normal_()
def read():
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(); wide.sum(); end.record(); end.synchronize()
    return wide.nbytes / begin.elapsed_time(end) / 1e6
reads = sorted(read() for _ in range(11))
print(json.dumps({"gpu": torch.cuda.get_device_name(), "driver": subprocess.run(
    ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip(),
    "torch": torch.__version__, "h2d_gb_per_s": rates[5], "hbm_read_gb_per_s": reads[5]}))
PY

# run NAME ARGUMENT...: one JSON file a run.
run() {
  local name=$1
  shift
  echo "== $name" >&2
  "$lighter" run "$@" --json >"$scratch/run-$name.json"
}

ids() { seq -s, 1 "$1"; }

run 8b-bf16 configs/synthetic-llama-3.1-8b.yaml --max-tokens 128 --prompt-ids "$(ids 64)"
run scout-bf16-25-lru-28-layers configs/synthetic-scout.yaml --set model.layers=28 --set memory.host_budget=112GiB \
  --max-tokens 48 --prompt-ids "$(ids 16)"
run scout-bf16-25-static-38-layers configs/synthetic-scout.yaml --set model.layers=38 --set memory.host_budget=112GiB \
  --set offload.policy=static --max-tokens 48 --prompt-ids "$(ids 16)"
run scout-bf16-25-prefill-4096 configs/synthetic-scout.yaml --set model.layers=12 --max-tokens 1 \
  --set memory.prefill_chunk=2048 --prompt-ids "$(ids 4096)"

python3 - "$scratch" "$out" <<'PY'
import glob, json, os, sys
scratch, out = sys.argv[1:]
machine = json.load(open(f"{scratch}/machine.json"))
budget = {"8b-bf16": 20}
works = []
for file in sorted(glob.glob(f"{scratch}/run-*.json")):
    run = json.load(open(file))
    name = os.path.basename(file)[4:-5]
    row = {"work": name, "synthetic": True, "dtype": "bf16", "batch": 1, "prompt_tokens": len(run["prompt_ids"]),
           "generated_tokens": len(run["ids"]), "runs": 1}
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "device_peak_bytes",
                "host_peak_bytes", "hit_rate", "bytes_moved", "stall_s", "copy_busy_s", "copy_busy_bytes"):
        row[key] = run[key]
    row["gpu_budget_bytes"] = budget.get(name, 78) << 30
    if run["copy_busy_s"] > 0:
        row["pcie_busy_gb_per_s"] = run["copy_busy_bytes"] / run["copy_busy_s"] / 1e9
        row["of_h2d_ceiling"] = row["pcie_busy_gb_per_s"] / machine["h2d_gb_per_s"]
    works.append(row)
json.dump({"machine": machine, "works": works}, open(out, "w"), indent=1)
print("%-34s %9s %9s %8s %10s %9s" % ("work", "prefill/s", "decode/s", "hit", "GPU peak", "PCIe busy"))
for row in works:
    print("%-34s %9.1f %9.2f %7.1f%% %6.1f GiB %s" % (
        row["work"], row["prefill_tokens_per_s"], row["decode_tokens_per_s"], 100 * row["hit_rate"],
        row["device_peak_bytes"] / 2**30,
        "%.1f GB/s (%.0f%%)" % (row["pcie_busy_gb_per_s"], 100 * row["of_h2d_ceiling"]) if "pcie_busy_gb_per_s" in row else "-"))
print("ceilings: host to device %.1f GB/s, device memory %.0f GB/s" % (machine["h2d_gb_per_s"], machine["hbm_read_gb_per_s"]))
PY
