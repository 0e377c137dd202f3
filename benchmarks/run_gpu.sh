#!/usr/bin/env bash
# Everything that needs a GPU, in one command without network: [DEADLINE=480] benchmarks/run_gpu.sh OUT
#
# Builds with the torch that is there, runs the benchmarks, the tests on the GPU and compute-sanitizer on the CUDA C++ kernels, and
# tries block sizes. It ends within DEADLINE seconds, or the 15 that an interrupted stage has to finish: a stage gets its limit or
# what is left, and is skipped if nothing is, so the most wanted come first. One that fails does not stop the next. How each ended is
# in OUT/stages.txt; results to keep are OUT/benchmarks.json, as benchmarks/results/<gpu>-<date>.json.
set -uo pipefail
[[ $# == 1 && $1 != -* ]] || { echo "usage: [DEADLINE=480] benchmarks/run_gpu.sh OUT" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
deadline=${DEADLINE:-480}
export PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin

# stage LOG NAME SECONDS COMMAND...
stage() {
  local log=$out/$1.log name=$2 limit=$3 start=$SECONDS left=$((deadline - SECONDS)) status
  shift 3
  if ((left < 5)); then
    echo "$name: skipped, no time left" | tee -a "$out/stages.txt"
    return
  fi
  echo "== $name" >>"$log"
  timeout -s INT -k 15 $((left < limit ? left : limit)) "$@" >>"$log" 2>&1
  status=$?
  echo "$name: exit $status after $((SECONDS - start)) s" | tee -a "$out/stages.txt"
  tail -n 3 "$log" | sed 's/^/    /'
}

rm -f "$out"/{stages.txt,benchmarks.json,host_cost.json,tune.jsonl,benchmarks.log,tests.log,other.log}
stage other environment 30 bash -c "nvidia-smi; nvcc --version; $python --version; $python -m pip list"
stage other install 180 env SORA_KERNELS_CUDA=1 "$python" -m pip install -v --no-build-isolation --no-deps -e .
stage other info 30 "$python" -m sora_kernels.info
stage benchmarks benchmarks 260 "$python" -m pytest benchmarks -v --continue-on-collection-errors --benchmark-only \
  --results "$out/benchmarks.json"
stage benchmarks table 20 "$python" -m benchmarks.report "$out/benchmarks.json"
stage tests tests 150 benchmarks/run_gpu_tests.sh "$python"
if command -v compute-sanitizer >/dev/null; then
  # Every kernel of csrc/cuda, forward and backward, on rows of a wider buffer; then on rows of odd and of large size.
  some="(test_any_strides and rows) or (test_gate_residual_layer_norm_modulate and (D37 or D1152)) or (test_qk_norm_rope and d10) or (test_bias_gelu and D37)"
  stage other sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest -v -m gpu -k "cuda-cuda and (bfloat16 or float32) and ($some)" \
    tests/test_adaln.py tests/test_bias_gelu.py tests/test_rope.py tests/test_patchify.py
else
  echo "sanitizer: skipped, no compute-sanitizer" | tee -a "$out/stages.txt"
fi
stage other host_cost 40 "$python" -m benchmarks.host_cost --json "$out/host_cost.json"
stage other tune 120 "$python" -m benchmarks.tune --kernel forward dq dkdv --head-dim 128 64 --dtype bfloat16 --seconds 10 \
  --json "$out/tune.jsonl"
cat "$out/stages.txt"
! grep -q "exit [1-9]" "$out/stages.txt"
