#!/usr/bin/env bash
# Everything that only an NVIDIA GPU can tell, in one command and under 9 minutes: builds, tests, compute-sanitizer, benchmarks.
# Logs and JSON go to $OUT (./out). A part that fails or runs out of time does not stop those after it. Exit code: parts that failed.
# Needs PyTorch with CUDA, nvcc, pybind11 and tqdm; no network. PYTHON says which Python.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=${OUT:-out}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
JOBS=${JOBS:-$(nproc)}
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PYTHONUNBUFFERED=1
export OUT PYTHON JOBS PYTHONPATH PYTHONUNBUFFERED
summary=()
failures=0

ALL=540 # seconds

# part NAME SECONDS COMMAND..: runs it with a limit, its output in $OUT/NAME.log; where less is left of all, with that.
part() {
  local name=$1 limit=$2 start=$SECONDS code=0 verdict=ok left=$((ALL - SECONDS))
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 10 ]; then
    failures=$((failures + 1))
    summary+=("$(printf '%-22s %4ss  %s' "$name" 0 "no time left to begin")")
    return
  fi
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    verdict="no time left after ${limit}s"
  elif [ "$code" -ne 0 ]; then
    verdict="FAILED ($code)"
  fi
  [ "$code" -eq 0 ] || failures=$((failures + 1))
  tail -n 15 "$OUT/$name.log"
  summary+=("$(printf '%-22s %4ss  %s' "$name" "$((SECONDS - start))" "$verdict")")
}

# With pip where the build tools are there; where that leaves no CUDA module, with nvcc and g++ alone, in place.
# shellcheck disable=SC2329  # called by `bash -c build`
build() {
  if "$PYTHON" -c 'import pybind11, cmake, setuptools' && "$PYTHON" -m pip install --no-build-isolation --no-deps --quiet -e .; then
    echo "built with pip"
  fi
  if ! "$PYTHON" -c 'import pckernels._cuda'; then
    echo "building the CUDA module with nvcc alone"
    csrc/cuda/build.sh "$OUT/objects" && cp "$OUT"/objects/_cuda*.so pckernels/ && rm -r "$OUT/objects"
  fi
  "$PYTHON" - <<'PYTHON_END'
import sys
import pckernels as pck
from pckernels import _cuda
print(_cuda.info())
print({name: (support.ok, support.reason) for name, support in pck.backends().items()})
sys.exit(0 if pck.backends()["cuda"].ok else 1)
PYTHON_END
}

# shellcheck disable=SC2329  # called by `bash -c 'sanitize ..'`
sanitize() {
  command -v compute-sanitizer || { echo "compute-sanitizer is not on the PATH"; return 1; }
  # Unless all kernels are watched, initcheck takes what PyTorch wrote for memory that nobody wrote.
  local only=(--kernel-regex kns=pckernels)
  [ "$1" = initcheck ] && only=()
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 "${only[@]}" "$PYTHON" bench/gpu_small.py
}
export -f build sanitize

nvidia-smi >"$OUT/nvidia-smi.log" 2>&1 || true
part build 120 bash -c build
# pckernels.triton is the folder triton_kernels once pckernels is installed; where it is not, a link for as long as this runs.
if ! "$PYTHON" -c 'import pckernels.triton' 2>/dev/null; then
  ln -s ../triton_kernels pckernels/triton
  trap 'rm -f pckernels/triton' EXIT
fi
part tests 100 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_cuda_gpu.py --junitxml="$OUT/tests.xml"
part graph 35 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_graph_gpu.py --junitxml="$OUT/graph-tests.xml"
for tool in memcheck racecheck synccheck initcheck; do
  # shellcheck disable=SC2016  # the inner bash expands it
  part "$tool" 25 bash -c 'sanitize "$1"' _ "$tool"
done

# The table of goals. Its cases come first, and the JSON is written after each: what no time is left for is named in the table.
BENCH=$((ALL - SECONDS - 185)) # of the rest, all but what the parts below may take; they get less where that is too little
[ "$BENCH" -ge 150 ] || BENCH=150
part bench "$BENCH" "$PYTHON" -m pckernels bench --suite gpu --limit $((BENCH - 20)) --json "$OUT/bench.json"
part bench-tables 10 "$PYTHON" -m pckernels bench --from "$OUT/bench.json"
part triton-tests 105 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton_gpu.py tests/test_triton_step.py \
  tests/test_triton_chain.py tests/test_triton_kernels.py --junitxml="$OUT/triton-tests.xml"
part benchmark 30 "$PYTHON" bench/gpu_step.py --out "$OUT/gpu_step.json" --limit 18
part triton-benchmark 50 "$PYTHON" bench/gpu_triton.py --out "$OUT/gpu_triton.json" --limit 35

# Skipped tests ran no kernel: all skipped is no success.
for tests in tests graph-tests triton-tests; do
  if ! "$PYTHON" - "$OUT/$tests.xml" <<'PYTHON_END'
import sys
import xml.etree.ElementTree as tree
suite = tree.parse(sys.argv[1]).getroot().find("testsuite")
ran = int(suite.get("tests")) - int(suite.get("skipped"))
print(f"{ran} tests ran, {suite.get('skipped')} skipped, {suite.get('failures')} failed, {suite.get('errors')} errors")
sys.exit(0 if ran else 1)
PYTHON_END
  then
    failures=$((failures + 1))
    summary+=("$tests: no test ran a kernel")
  fi
done

{
  printf '%s\n' "${summary[@]}"
  echo "$failures failed, $SECONDS s"
} | tee "$OUT/summary.txt"
exit "$failures"
