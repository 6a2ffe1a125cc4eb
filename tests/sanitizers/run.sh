#!/usr/bin/env bash
# The tests of everything that needs no libtorch, under ASan with UBSan and under TSan: ten minutes on two cores the
# first time, two when nothing has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tests/sanitizers/build_onetbb.sh
for preset in cpu-asan cpu-tsan; do
  cmake --preset "$preset" -DLIGHTER_CORE_ONLY=ON
  cmake --build --preset "$preset" --target core_tests
  ctest --preset "$preset" -R '^core$'
done
