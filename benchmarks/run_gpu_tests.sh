#!/usr/bin/env bash
# The tests that run on a GPU, several processes at a time, as most of their time goes to compiling: run_gpu_tests.sh PYTHON
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1
pids=()
run() {
  local log
  log=$(mktemp)
  "$python" -m pytest -q -m gpu -p no:cacheprovider "$@" >"$log" 2>&1
  local status=$?
  cat "$log"
  return $status
}
for dtype in float32 bfloat16 float16 float64; do
  run tests/test_attention.py -k "$dtype and test_packed" & pids+=($!)
  run tests/test_attention.py -k "$dtype and not test_packed" & pids+=($!)
  run tests/test_rope.py tests/test_patch_embed.py tests/test_patchify.py -k "$dtype" & pids+=($!)
done
run tests/test_adaln.py tests/test_gpu.py & pids+=($!)
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit $status
