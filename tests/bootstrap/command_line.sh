#!/usr/bin/env bash
# What bootstrap.sh promises before it installs or fetches anything. It runs on a copy in an
# empty folder, with --no-install wherever it could get as far as that.
set -euo pipefail
source_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$source_folder/bootstrap.sh" "$folder"
cd "$folder"
unset LIBTORCH
failures=0

# expect CODE TEXT ARGUMENT...: the exit code, and a piece of what is printed.
expect() {
  local code=$1 text=$2 output status=0
  shift 2
  output=$(./bootstrap.sh "$@" 2>&1) || status=$?
  [[ $status == "$code" && $output == *"$text"* ]] && return
  printf 'bootstrap.sh %s: exit code %s, expected %s and "%s"\n%s\n' "$*" "$status" "$code" "$text" "$output"
  failures=$((failures + 1))
}

expect 0 "Usage:" help
expect 2 "no command"
expect 2 "unknown argument: --gpu" test --gpu
expect 2 "two commands" demo test
expect 2 "exclude each other" test --cuda --cpu
expect 2 "--jobs takes a number" build --jobs 0
expect 2 "--libtorch needs a value" build --libtorch
expect 2 "not a folder" build --libtorch "$folder/none"
expect 1 "holds no lib/libtorch_cpu.so" build --cpu --no-install --libtorch "$folder"

mkdir -p torch/lib torch/include/torch/headeronly
touch torch/lib/libtorch_cpu.so
printf '#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n' >torch/include/torch/headeronly/version.h
expect 1 "is libtorch 2.9, this needs 2.11.*" build --cpu --no-install --libtorch torch
printf '#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 11\n' >torch/include/torch/headeronly/version.h
expect 1 "has no CUDA" build --cuda --no-install --libtorch torch

# A GPU is found however much nvidia-smi has to say after its first line, and however slowly it says it.
printf '#!/bin/sh\necho "GPU 0: a"\nsleep 0.2\necho "GPU 1: b"\nsleep 0.2\necho "GPU 2: c"\n' >nvidia-smi
chmod +x nvidia-smi
PATH=$PWD:$PATH expect 1 "a GPU; building for CUDA" build --no-install --libtorch torch
rm nvidia-smi

((failures == 0)) && echo "every promise held"
