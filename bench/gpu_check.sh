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

# limited NAME SECONDS COMMAND..: runs it with a limit, or with what is left of all where that is less, its output in $OUT/NAME.log.
limited() {
  local name=$1 limit=$2 left=$((ALL - SECONDS))
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 10 ]; then
    echo "no time left to begin" >"$OUT/$name.log"
    return 124
  fi
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
}

# report NAME SECONDS CODE: what became of a part.
report() {
  local verdict=ok
  if [ "$3" -eq 124 ] || [ "$3" -eq 137 ]; then
    verdict="no time left"
  elif [ "$3" -ne 0 ]; then
    verdict="FAILED ($3)"
  fi
  [ "$3" -eq 0 ] || failures=$((failures + 1))
  tail -n 15 "$OUT/$1.log"
  summary+=("$(printf '%-22s %4ss  %s' "$1" "$2" "$verdict")")
}

# part NAME SECONDS COMMAND..: one after the other.
part() {
  local code=0 start=$SECONDS
  echo "== $1"
  limited "$@" || code=$?
  report "$1" "$((SECONDS - start))" "$code"
}

# beside NAME SECONDS COMMAND..: while the parts that follow run. `join` waits for all of them.
names=() jobs=()
beside() {
  ( code=0
    limited "$@" || code=$?
    echo "$SECONDS $code" >"$OUT/$1.end" ) &
  names+=("$1") jobs+=("$!")
}

join() {
  local k seconds code
  for k in "${!names[@]}"; do
    wait "${jobs[$k]}"
    read -r seconds code <"$OUT/${names[$k]}.end"
    rm "$OUT/${names[$k]}.end"
    echo "== ${names[$k]}"
    report "${names[$k]}" "$seconds" "$code"
  done
  names=() jobs=()
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
# pckernels.triton is the folder triton_kernels once pckernels is installed; where it is not, a link for as long as this runs.
if ! "$PYTHON" -c 'import pckernels.triton' 2>/dev/null; then
  ln -s ../triton_kernels pckernels/triton
  trap 'rm -f pckernels/triton' EXIT
fi
# What needs no CUDA module runs while it is built: Triton's kernels and the graph tier on the GPU (most of which is Triton compiling), and
# what of Triton's needs no GPU: each kernel compiled within its budgets, and in the interpreter.
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider)
INTERPRETED=(env TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= "${PYTEST[@]}")
beside graph 230 "${PYTEST[@]}" tests/test_graph_gpu.py --junitxml="$OUT/graph-tests.xml"
beside triton-tests 230 "${PYTEST[@]}" tests/test_triton_gpu.py tests/test_triton_rows.py tests/test_triton_step.py \
  tests/test_triton_cross_entropy.py tests/test_triton_max_pool.py tests/test_triton_chain.py tests/test_triton_kernels.py \
  --junitxml="$OUT/triton-tests.xml"
beside compiled-tests 230 "${PYTEST[@]}" tests/test_triton_build.py tests/test_triton_pinned.py --junitxml="$OUT/compiled-tests.xml"
beside interpreted-steps 230 "${INTERPRETED[@]}" tests/test_triton_rows.py tests/test_triton_step.py tests/test_triton_cross_entropy.py \
  tests/test_triton_max_pool.py --junitxml="$OUT/interpreted-steps.xml"
beside interpreted-chains 230 "${INTERPRETED[@]}" tests/test_triton_kernels.py tests/test_triton_chain.py \
  --junitxml="$OUT/interpreted-chains.xml"
part build 120 bash -c build
part tests 100 "${PYTEST[@]}" tests/test_cuda_gpu.py --junitxml="$OUT/tests.xml"
join
for tool in memcheck racecheck synccheck initcheck; do
  # shellcheck disable=SC2016  # the inner bash expands it
  part "$tool" 25 bash -c 'sanitize "$1"' _ "$tool"
done

# The table of goals. Its cases come first, and the JSON is written after each: what no time is left for is named in the table.
BENCH=$((ALL - SECONDS - 95)) # of the rest, all but what the parts below may take; they get less where that is too little
[ "$BENCH" -ge 150 ] || BENCH=150
part bench "$BENCH" "$PYTHON" -m pckernels bench --suite gpu --limit $((BENCH - 20)) --json "$OUT/bench.json"
part bench-tables 10 "$PYTHON" -m pckernels bench --from "$OUT/bench.json"
part benchmark 30 "$PYTHON" bench/gpu_step.py --out "$OUT/gpu_step.json" --limit 18
part triton-benchmark 50 "$PYTHON" bench/gpu_triton.py --out "$OUT/gpu_triton.json" --limit 35

# Skipped tests ran no kernel: all skipped is no success.
for tests in tests graph-tests triton-tests compiled-tests interpreted-steps interpreted-chains; do
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
