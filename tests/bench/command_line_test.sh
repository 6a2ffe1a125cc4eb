#!/usr/bin/env bash
# lighter bench and compare as a user meets them: mistakes, Ctrl-C, resume. Usage: command_line_test.sh LIGHTER SOURCE_DIR
set -uo pipefail
lighter=$1
source_folder=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failures=0

fail() {
  printf 'FAILED: %s\n' "$*"
  failures=$((failures + 1))
}

# refuses CODE TEXT ARGUMENT...
refuses() {
  local code=$1 text=$2
  shift 2
  "$lighter" "$@" >"$scratch/out" 2>"$scratch/err" </dev/null
  local rc=$?
  [[ $rc == "$code" ]] || fail "lighter $*: exit code $rc instead of $code: $(head -c 300 "$scratch/err")"
  grep -qF -- "$text" "$scratch/err" || fail "lighter $*: no '$text' in: $(head -c 400 "$scratch/err")"
}

# sweep: a small one; the text of its last block follows.
sweep() {
  cat <<YAML
name: small
baseline: whole
warmup: 0
repeats: 2
models:
  - {name: whole, config: $source_folder/configs/demo.yaml, set: [memory.gpu_budget=64MiB, offload.resident=1]}
  - {name: paged, config: $source_folder/configs/demo.yaml, set: [memory.gpu_budget=64MiB]}
points:
  - {models: [paged], prompt_tokens: 8, generated_tokens: $1, $2}
YAML
}

refuses 2 '--out is required' bench "$scratch/none.yaml"
refuses 2 'none.yaml' bench "$scratch/none.yaml" --out "$scratch/x"
sweep 8 'resident: [0.5], rsident: 1' >"$scratch/typing.yaml"
refuses 2 "did you mean 'points[0].resident'" bench "$scratch/typing.yaml" --out "$scratch/x"
sweep 8 'resident: [0.5], policy: lru2' >"$scratch/policy.yaml"
refuses 2 "policy.yaml:9:87: 'points[0].policy' must be one of static" bench "$scratch/policy.yaml" --out "$scratch/x"
[[ -e $scratch/x ]] && fail 'a mistake in the sweep left a folder behind'
refuses 2 'cannot be read' compare "$scratch/a.json" "$scratch/b.json"
{ sweep 8 'resident: 0.5'; echo "trace: typing.yaml"; } >"$scratch/trace.yaml"
refuses 2 'trace.yaml:10:8: ' bench "$scratch/trace.yaml" --out "$scratch/x"

# Where no point can be measured the sweep has failed; here the text is too short for its prompts.
echo 'It was' >"$scratch/short.txt"
{ sweep 8 'resident: 0.5'; echo "prompt: {file: short.txt}"; } >"$scratch/short.yaml"
refuses 1 'nothing was measured' bench "$scratch/short.yaml" --out "$scratch/short"
grep -q 'The baseline, whole, could not be measured' "$scratch/err" || fail 'no word of the baseline'

# Without a baseline in the sweep it is Llama-3.1-8B, which the tiny model's budget refuses.
sweep 8 'resident: 0.5' | grep -v '^baseline:' >"$scratch/usual.yaml"
"$lighter" bench "$scratch/usual.yaml" --out "$scratch/usual" 2>/dev/null || fail 'a sweep without a baseline'
python3 -c 'import json, sys
r = json.load(open(sys.argv[1]))
first = r["points"][0]
assert r["baseline"] == first["label"] == "Llama-3.1-8B bf16" and first["error"]["kind"] == "CapacityError", first
assert sum(p["status"] == "measured" for p in r["points"]) == 1' "$scratch/usual/results.json" || fail 'the usual baseline'

# What the machine cannot do is recorded, not fatal: here a batch whose keys and values pass the budget.
sweep 8 'batch: [1, 3, 200]' >"$scratch/batch.yaml"
"$lighter" bench "$scratch/batch.yaml" --out "$scratch/batch" --json >"$scratch/batch.json" 2>/dev/null || fail 'a failed point ended the sweep'
python3 - "$scratch/batch.json" "$scratch/batch/results.json" <<'PY' || fail 'the failed points are not recorded'
import json, sys
shown, kept = (json.load(open(name)) for name in sys.argv[1:])
assert shown == kept and kept["complete"]
failed = [point for point in kept["points"] if point["status"] == "failed"]
assert failed and all("memory.gpu_budget" in point["error"]["message"] for point in failed), failed
assert all(point["workload"]["batch"] == 200 for point in failed), failed
assert sum(point["status"] == "measured" for point in kept["points"]) == 8
three = next(p for p in kept["points"] if p["workload"]["batch"] == 3)
assert len(three["runs"][0]["first_token_s"]) == 3 and three["decode_tokens_per_s"]["median"] > 0
PY

# Ctrl-C keeps what is done; resume measures the rest and nothing twice.
sweep 300 'resident: [0, 0.25, 0.5, 0.75]' >"$scratch/long.yaml"
"$lighter" bench "$scratch/long.yaml" --out "$scratch/long" 2>"$scratch/err" &
pid=$!
for _ in $(seq 600); do
  grep -q '^\[3/' "$scratch/err" && break
  sleep 0.05
done
kill -INT $pid
wait $pid
rc=$?
[[ $rc == 130 ]] || fail "Ctrl-C ended the sweep with $rc"
grep -q 'resume goes on' "$scratch/err" || fail 'no word of --resume'
[[ -s $scratch/long/report.html ]] || fail 'no report after Ctrl-C'
refuses 2 'go on with it with --resume' bench "$scratch/long.yaml" --out "$scratch/long"
refuses 2 "none of this sweep's points" bench "$scratch/batch.yaml" --out "$scratch/long" --resume
"$lighter" bench "$scratch/long.yaml" --out "$scratch/long" --resume 2>"$scratch/err" || fail 'resume failed'
grep -Eq ' [1-9] taken over, 0 failed' "$scratch/err" || fail "resume took nothing over: $(tail -n 2 "$scratch/err")"
python3 -c 'import json, sys
r = json.load(open(sys.argv[1]))
assert r["complete"] and len(r["points"]) == 7 and not r["interrupted"]' "$scratch/long/results.json" || fail 'the resumed sweep is not whole'

# Against itself, nothing changed.
[[ $("$lighter" compare "$scratch/long/results.json" "$scratch/long/results.json") == *"Nothing changed beyond noise"* ]] ||
  fail 'compare sees a change where there is none'
"$lighter" compare --json "$scratch/long/results.json" "$scratch/batch/results.json" |
  python3 -c 'import json, sys; assert json.load(sys.stdin)["only_in_a"]' || fail 'compare --json'

# A recorded trace stands in for the router of synthetic weights, and says so.
"$lighter" trace "$source_folder/configs/demo.yaml" --prompt 'It was' --max-tokens 30 --out "$scratch/it.trace" 2>/dev/null || fail 'trace'
cat >"$scratch/synthetic.yaml" <<YAML
model: {synthetic: $source_folder/models/tiny/config.json}
device: cpu
memory: {gpu_budget: 64MiB, host_budget: 64MiB, context: 256}
cpu: {threads: 1}
YAML
cat >"$scratch/replayed.yaml" <<YAML
name: replayed
baseline: whole
repeats: 1
models:
  - {name: whole, config: synthetic.yaml, set: [offload.resident=1]}
  - {name: paged, config: synthetic.yaml}
points:
  - {models: [paged], resident: 0.5, prompt_tokens: 64, generated_tokens: 16}
trace: it.trace
YAML
"$lighter" bench "$scratch/replayed.yaml" --out "$scratch/replayed" 2>"$scratch/err" || fail "a sweep with a trace: $(cat "$scratch/err")"
python3 -c 'import json, sys
facts = [p["facts"] for p in json.load(open(sys.argv[1]))["points"] if p["status"] == "measured"]
assert len(facts) == 4 and all(f["synthetic"] and f["routing"] == "trace it.trace" for f in facts), facts' \
  "$scratch/replayed/results.json" || fail 'the trace is not named'
grep -q 'Routing: trace it.trace\.' "$scratch/replayed/table.md" || fail 'the table does not name the trace'

[[ $failures == 0 ]] && printf 'bench and compare: all checks passed\n'
exit $((failures > 0))
