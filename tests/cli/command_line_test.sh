#!/usr/bin/env bash
# What a user meets on the command line: exit codes, messages, JSON. Usage: command_line_test.sh LIGHTER SOURCE_DIR
set -uo pipefail
lighter=$1
demo=$2/configs/demo.yaml
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export XDG_CACHE_HOME=$scratch/cache # where calibrations are kept
failures=0

fail() {
  printf 'FAILED: %s\n' "$*"
  failures=$((failures + 1))
}

# refuses CODE TEXT ARGUMENT...: the program ends with CODE and says TEXT on stderr, and nothing on stdout.
refuses() {
  local code=$1 text=$2
  shift 2
  "$lighter" "$@" >"$scratch/out" 2>"$scratch/err" </dev/null
  local rc=$?
  [[ $rc == "$code" ]] || fail "lighter $*: exit code $rc instead of $code: $(head -c 300 "$scratch/err")"
  grep -qF -- "$text" "$scratch/err" || fail "lighter $*: no '$text' in: $(head -c 400 "$scratch/err")"
}

# The user's mistakes.
refuses 2 'subcommand'
refuses 2 'CONFIG is required' run
refuses 2 'nope.yaml' run "$scratch/nope.yaml"
refuses 2 '--bogus' run "$demo" --bogus
refuses 2 'did you mean' run "$demo" --set offload.polcy=lru
refuses 2 'outside the vocabulary of 4096' run "$demo" --prompt-ids 4096
refuses 2 '--prompt-ids' run "$demo" --prompt-ids a,b
refuses 2 'more than memory.gpu_budget' run "$demo" --set memory.gpu_budget=20MiB
refuses 2 'offload.resident up to' run "$demo" --set offload.resident=0.9
refuses 2 'more than memory.host_budget' run "$demo" --set memory.host_budget=2MiB
refuses 2 'made for 1024 positions' run "$demo" --set memory.context=2048
refuses 2 'lists 1 ratios, but the model has 6 layers' run "$demo" --set 'offload.resident=[0.5]'
refuses 2 'names layer 9' run "$demo" --set 'offload.pin=["9/*"]'
refuses 2 'give one with --text' quantize "$demo" --set model.head=int4 --out "$scratch/q"
refuses 2 'leave --text out' quantize "$demo" --set model.head=int8 --text "$demo" --out "$scratch/q"
refuses 2 '--tokens requires --text' quantize "$demo" --set model.head=int8 --tokens 5 --out "$scratch/q"
refuses 2 'nothing is to be quantized' quantize "$demo" --text "$2/models/tiny/calibration.txt" --out "$scratch/q"
refuses 2 'drawn quantized' quantize "$2/configs/synthetic-scout.yaml" --set device=cpu --text "$demo" --out "$scratch/q"
refuses 2 'more than memory.gpu_budget' quantize "$demo" --set model.experts=int4 --text "$2/models/tiny/calibration.txt" \
  --out "$scratch/q"
refuses 2 'does not divide' run "$demo" --set offload.slice_width=100
refuses 2 'must be' run "$demo" --set generate.temperature=-1
refuses 2 'config.json: cannot be read' run "$demo" --set "model.path=$scratch"
refuses 2 'no tokenizer' run "$demo" --set model.path= --set model.synthetic="$2/models/tiny/config.json" --prompt hi
refuses 2 "no tokenizer" trace "$demo" --set model.path= --set model.synthetic="$2/models/tiny/config.json" --prompt hi --out "$scratch/t"

# A damaged checkpoint.
cp -r "$2/models/tiny" "$scratch/damaged"
truncate -s -100 "$scratch/damaged/model.safetensors"
refuses 2 'truncated' run "$demo" --set "model.path=$scratch/damaged" --prompt hi
printf '{"a": ' >"$scratch/damaged/config.json"
refuses 2 'not valid JSON' run "$demo" --set "model.path=$scratch/damaged" --prompt hi
printf 'model: {path: %s\n' x >"$scratch/broken.yaml"
refuses 2 'broken.yaml:' run "$scratch/broken.yaml"

# A plan that does not fit is printed, and the exit code says so.
"$lighter" plan "$demo" --set memory.gpu_budget=20MiB >"$scratch/out" 2>&1
[[ $? == 2 ]] || fail 'plan of what does not fit does not end with 2'
grep -q 'It does not fit' "$scratch/out" || fail 'plan does not say that it does not fit'

# JSON is one object on stdout with the promised keys.
"$lighter" run "$demo" --prompt 'In the beginning' --max-tokens 5 --logprobs 3 --json >"$scratch/run.json" 2>/dev/null ||
  fail 'run --json failed'
python3 - "$scratch/run.json" <<'PY' || fail 'run --json has not the promised form'
import json, sys
run = json.load(open(sys.argv[1]))
keys = ["prompt_ids", "ids", "text", "logprobs", "prefill_tokens_per_s", "decode_tokens_per_s",
        "time_to_first_token_s", "device_peak_bytes", "host_peak_bytes", "hit_rate", "bytes_moved", "stall_s"]
assert all(key in run for key in keys), [key for key in keys if key not in run]
assert len(run["ids"]) == 5 and len(run["logprobs"]) == 5 and all(len(token) == 3 for token in run["logprobs"])
assert all(entry["logprob"] <= 0 for token in run["logprobs"] for entry in token)
assert 0 < run["hit_rate"] < 1 and run["bytes_moved"] > 0
assert run["device_peak_bytes"] <= 28 << 20 and run["host_peak_bytes"] <= 64 << 20
PY
"$lighter" plan "$demo" --json | python3 -c 'import json, sys; plan = json.load(sys.stdin); assert plan["fits"]' ||
  fail 'plan --json'

# A plan predicts the speed: from documented figures, then from what was measured here, then not from another's.
kept=$scratch/cache/lighter/calibration-cpu.json
plan_says() {
  local text=$1
  shift
  "$lighter" plan "$demo" "$@" >"$scratch/out" 2>&1 || fail "plan $* failed: $(head -c 300 "$scratch/out")"
  grep -qF -- "$text" "$scratch/out" || fail "plan $*: no '$text' in: $(tail -n 8 "$scratch/out")"
}
plan_says 'not measured'
plan_says 'run lighter calibrate'
"$lighter" calibrate "$demo" >"$scratch/out" 2>"$scratch/err" || fail "calibrate failed: $(head -c 300 "$scratch/err")"
grep -q "written to $kept" "$scratch/err" || fail 'calibrate does not say where it wrote'
grep -q 'copies, host to device' "$scratch/out" || fail 'calibrate shows no rates'
plan_says 'measured on cpu, 20'
plan_says 'is not used: it is of 1 threads, here are 2' --set cpu.threads=2
"$lighter" plan "$demo" --json | python3 -c '
import json, sys
speed = json.load(sys.stdin)["predicted"]
assert speed["measured_here"] and not speed["note"], speed
decode, prefill = speed["decode"], speed["prefill"]
assert 0 < decode["tokens_per_s"] < decode["bound_tokens_per_s"], decode
assert 0 < prefill["tokens_per_s"] <= prefill["bound_tokens_per_s"], prefill
assert decode["miss"] == "fetch" and decode["link_s"] > 0 and decode["cpu_s"] == 0, decode
parts = decode["outside_s"] + max(decode["experts_s"], decode["link_s"]) + decode["fixed_s"]
assert abs(parts - decode["step_s"]) < 1e-9, decode
' || fail 'plan --json does not predict'
mv "$kept" "$scratch/elsewhere.json"
plan_says 'not measured'
plan_says 'measured on cpu' --calibration "$scratch/elsewhere.json"
sed 's|"version": [0-9]*|"version": 999|' "$scratch/elsewhere.json" >"$kept"
plan_says 'is of another version'
refuses 2 'another version' plan "$demo" --calibration "$kept"
sed 's/"link": [0-9.]*/"link": -1/' "$scratch/elsewhere.json" >"$kept"
refuses 2 'link must be a number above 0' plan "$demo"
printf 'not JSON' >"$kept"
refuses 2 'make it anew with lighter calibrate' plan "$demo"
rm "$kept"
refuses 2 'cannot be read' plan "$demo" --calibration "$scratch/nowhere.json"
refuses 2 'is of cpu, but device is cuda' plan "$demo" --calibration "$scratch/elsewhere.json" --set device=cuda
refuses 2 'CONFIG is required' calibrate
refuses 2 'nope.yaml' calibrate "$scratch/nope.yaml"

# A folder that quantize writes is run like any other, in its own formats.
calibration=$2/models/tiny/calibration.txt
room=(--set memory.gpu_budget=256MiB --set memory.host_budget=256MiB --set memory.context=256)
"$lighter" quantize "$demo" "${room[@]}" --set model.experts=int4 --set model.head=int8 --text "$calibration" \
  --tokens 600 --out "$scratch/tiny-int4/" >"$scratch/out" 2>"$scratch/err" || fail "quantize failed: $(head -c 300 "$scratch/err")"
grep -q 'rounded by 600 tokens' "$scratch/out" || fail "quantize does not say what it did: $(head -c 300 "$scratch/out")"
grep -q '96 experts were chosen by fewer tokens than their 128' "$scratch/err" || fail "quantize does not say that it had little text"
"$lighter" run "$demo" --set model.path="$scratch/tiny-int4" --prompt 'It was' --max-tokens 5 >"$scratch/out" 2>"$scratch/err" ||
  fail "a quantized folder does not run: $(head -c 300 "$scratch/err")"
refuses 2 'is there already' quantize "$demo" "${room[@]}" --set model.experts=int4 --text "$calibration" --tokens 600 \
  --out "$scratch/tiny-int4"
refuses 2 'quantized already' quantize "$demo" "${room[@]}" --set model.path="$scratch/tiny-int4" --text "$calibration" \
  --tokens 600 --out "$scratch/again"
refuses 2 'holds int4; leave the formats out' run "$demo" --set model.path="$scratch/tiny-int4" --set model.experts=int8
refuses 2 'holds slices of 256' run "$demo" --set model.path="$scratch/tiny-int4" --set offload.slice_width=128
"$lighter" quantize "$demo" "${room[@]}" --set model.format=int8 --out "$scratch/tiny-int8" >"$scratch/out" 2>"$scratch/err" ||
  fail "quantize to int8 failed: $(head -c 300 "$scratch/err")"
grep -q 'rounded to the nearest' "$scratch/out" || fail "quantize does not say how it rounds: $(head -c 300 "$scratch/out")"
truncate -s -1 "$scratch"/tiny-int4/model-00003-of-00007.safetensors
refuses 2 'model-00003-of-00007' run "$demo" --set model.path="$scratch/tiny-int4"
sed -i 's/"lighter"/"gptq"/' "$scratch/tiny-int4/config.json"
refuses 2 'by gptq' run "$demo" --set model.path="$scratch/tiny-int4"

# The same seed gives the same text; another gives another.
text() { "$lighter" run "$demo" --prompt 'It was' --max-tokens 20 --set generate.seed="$1" 2>/dev/null; }
[[ $(text 1) == "$(text 1)" ]] || fail 'the same seed gave another text'
[[ $(text 1) != "$(text 2)" ]] || fail 'another seed gave the same text'

# Ctrl-C ends the text after the step at hand, with the summary.
"$lighter" run "$demo" --prompt 'It was' --set generate.ignore_eos=true --max-tokens 480 >"$scratch/out" 2>"$scratch/err" &
pid=$!
for _ in $(seq 100); do
  [[ -s $scratch/out ]] && break
  sleep 0.05
done
kill -INT $pid
wait $pid
rc=$?
if [[ $rc == 130 ]]; then
  grep -q 'interrupted' "$scratch/err" || fail 'no word of the interruption'
elif [[ $rc != 0 ]]; then # 0: it was quicker than we were
  fail "Ctrl-C ended the run with $rc"
fi

[[ $failures == 0 ]] && printf 'command line: all checks passed\n'
exit $((failures > 0))
