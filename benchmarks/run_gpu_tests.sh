#!/usr/bin/env bash
# The tests that run on a GPU, several processes at a time, as most of their time goes to compiling: run_gpu_tests.sh PYTHON
set -uom pipefail # m: a process group for each, or they would ignore interrupts
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
stop() {
  for pid in "${pids[@]}"; do kill -INT -- "-$pid" 2>/dev/null; done
  wait
  exit 130
}
trap stop INT TERM
run tests/test_gpu.py tests/test_boundaries.py & pids+=($!)
for dtype in float32 bfloat16 "float16 and not bfloat16" float64; do
  run tests/test_attention.py -k "$dtype and test_packed" & pids+=($!)
  run tests/test_attention.py tests/test_spatiotemporal_attention.py -k "$dtype and not test_packed" & pids+=($!)
  run tests/test_rope.py tests/test_patch_embed.py tests/test_patchify.py -k "$dtype" & pids+=($!)
  run tests/test_adaln.py tests/test_bias_gelu.py -k "$dtype" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit $status
