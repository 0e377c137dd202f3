#!/usr/bin/env bash
# Everything that needs a GPU, in one command without network: benchmarks/run_gpu.sh OUT
#
# Builds with the torch that is there, runs the tests on the GPU, compute-sanitizer on the CUDA C++ kernels, and the benchmarks. Each
# stage's log and exit status go to OUT, and a stage that fails does not stop the next. Results to keep: OUT/benchmarks.json, as
# benchmarks/results/<gpu>-<date>.json.
set -uo pipefail
[[ $# == 1 && $1 != -* ]] || { echo "usage: benchmarks/run_gpu.sh OUT" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  timeout -s INT -k 20 "$seconds" "$@" >"$out/$name.log" 2>&1 # interrupted, pytest still writes what it has measured
  status=$?
  echo "$name: exit $status after $((SECONDS - start)) s" | tee -a "$out/stages.txt"
  tail -n 3 "$out/$name.log" | sed 's/^/    /'
}

: >"$out/stages.txt"
stage environment 60 bash -c "nvidia-smi; nvcc --version; $python --version; $python -m pip list"
stage install 180 env SORA_KERNELS_CUDA=1 "$python" -m pip install -v --no-build-isolation --no-deps -e .
stage info 60 "$python" -m sora_kernels.info
stage tests 170 benchmarks/run_gpu_tests.sh "$python"
stage sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -m gpu -k "cuda-cuda and float32 and (slack or gqa or dit)"
stage host_cost 60 "$python" -m benchmarks.host_cost --json "$out/host_cost.json"
stage benchmarks 150 "$python" -m pytest benchmarks -q --benchmark-only --benchmark-json="$out/benchmarks.json"
stage table 60 "$python" -m benchmarks.report "$out/benchmarks.json" --out "$out"
stage kernels 45 "$python" -m sora_kernels.report --arch sm90 --json "$out/kernels.json"
cat "$out/stages.txt"
! grep -qv "exit 0" "$out/stages.txt"
