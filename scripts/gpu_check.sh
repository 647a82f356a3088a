#!/usr/bin/env bash
# Checks and measures the CUDA kernels on this machine's GPU. Needs torch, nvcc, cmake and ninja, nothing else and no
# network. Leaves the GPU's settings alone.
#
#   ./scripts/gpu_check.sh [--only PART,PART...] [--built FOLDER]
#
# --built: what `cmake` and `cmake --install` made elsewhere, with the same torch: FOLDER/python/libxlstm and FOLDER/bin
# (its options: configure() below). Then nothing is built here, and nvcc is not needed.
# Parts (seconds at most): build (540, always first), conformance (240: every primitive against the emulator), ops (400:
# all operators against float64), sanitizer (540: compute-sanitizer's four tools on small shapes), hopper (840: the
# same and a benchmark with the sm_90a kernels, on compute capability 9.0), bench (560: scripts/bench/gpu_mlstm.py), slstm
# (560: gpu_slstm.py there). A part that fails does not stop the others. OUT: folder of summary.json, log.txt and the
# benchmarks' files (default build/gpu_check); PYTHON: interpreter that has torch. Exit 0: all passed, 1: something
# failed, 2: nothing ran.
set -uo pipefail
parts='build conformance ops sanitizer hopper bench slstm'
only=$parts
built_elsewhere=
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=${2:-}; [ -n "$only" ] || fail "--only takes parts: ${parts// /, }"; only=${only//,/ }; shift 2 ;;
    --built) built_elsewhere=$(realpath -e "${2:-}") || fail "--built takes a folder"; shift 2 ;;
    -h|--help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument $1 (see --help)" ;;
  esac
done
for part in $only; do [[ " $parts " == *" $part "* ]] || fail "unknown part $part; there are: ${parts// /, }"; done
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
gpu=$("$python" - <<'END'
import sys
try:
    import torch
except ImportError:
    sys.exit("torch is not installed")
if torch.version.cuda is None:
    sys.exit("torch is built without CUDA")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor} {torch.cuda.get_device_name()}")
END
) || fail "no GPU to check: see the line above (python: $python; PYTHON picks another)"
capability=${gpu%% *}
[ "$capability" -ge 80 ] || fail "the kernels need compute capability 8.0 or later; this is a ${gpu#* }"
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
[ -n "$built_elsewhere" ] || [ -x "$nvcc" ] || fail "nvcc was not found"
PATH=$(dirname "$nvcc"):$PATH
export PATH

build=${built_elsewhere:-$PWD/build/gpu}
OUT=${OUT:-$PWD/build/gpu_check}
mkdir -p "$OUT" "$build"
results=$build/results.txt
: >"$results"; : >"$OUT/log.txt"
wants() { [[ " $only " == *" $1 "* ]]; }
record() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$results"; printf '%-5s %s: %s (%s s)\n' "$3" "$1" "$2" "$4"; }
# check PART NAME LIMIT COMMAND...: one line of result; what the command prints goes to the log, its end is shown.
check() {
  local part=$1 name=$2 limit=$3 status=PASS begin=$SECONDS code
  shift 3
  printf '\n== %s: %s\n' "$part" "$name" | tee -a "$OUT/log.txt"
  timeout --kill-after=10 "$limit" "$@" >"$build/output.txt" 2>&1
  code=$?
  cat "$build/output.txt" >>"$OUT/log.txt"
  [ $code = 0 ] || status=FAIL
  if [ $code = 124 ] || [ $code = 137 ]; then echo "stopped after $limit s" | tee -a "$OUT/log.txt"; fi
  tail -n "${SHOW:-12}" "$build/output.txt" | cut -c1-200
  record "$part" "$name" $status $((SECONDS - begin))
  [ $status = PASS ]
}
skip() { printf '\n'; record "$1" "$2" SKIP 0; }

case $capability in
  80) architectures=80-real ;;
  90) architectures='80-real;90a-real' ;;
  *) architectures="80-real;$capability-real" ;;
esac
configure() {
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE="$(command -v "$python")" \
    -DXLSTM_CUDA=ON -DXLSTM_CUDA_ARCHITECTURES="$architectures" -DXLSTM_CPU_VARIANTS=native \
    -DXLSTM_BUILD_TRAIN=OFF -DXLSTM_BUILD_PYTHON=OFF -DXLSTM_BUILD_TESTS=OFF -DXLSTM_BUILD_CONFORMANCE=ON &&
  ninja -C "$build" && cmake --install "$build" --prefix "$build/python" && cp libxlstm/*.py "$build/python/libxlstm/"
}
export -f configure
export build python architectures
if [ -n "$built_elsewhere" ]; then
  SHOW=1 check build "operators built elsewhere" 60 env PYTHONSAFEPATH=1 PYTHONPATH="$build/python" "$python" -c \
    'import libxlstm; print(libxlstm.__file__)'
else
  SHOW=3 check build "operators and conformance programs for $architectures" 540 bash -c configure
fi
built=$?
# The operators just built, not those of another build in this tree.
export PYTHONSAFEPATH=1 PYTHONPATH=$build/python PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=INFO

# gpu_ops LIMIT NAME PART [VARIABLE=VALUE...] [-- OPTION...]: the operators, by the kernels and not by the generic path.
kernels_ran() {
  grep -q 'mlstm: kernels for CUDA' "$1" && grep -q 'slstm: kernels for CUDA' "$1" && ! grep '[ms]lstm: generic path' "$1"
}
export -f kernels_ran
check_ops() {
  local part=$1 name=$2 limit=$3
  shift 3
  check "$part" "$name" "$limit" bash -c '"$@" 2>&1 | tee "$build/ops.txt"; status=${PIPESTATUS[0]}
    kernels_ran "$build/ops.txt" || { echo "not every call was taken by the kernels"; status=1; }
    exit $status' - "$@"
}

# check_memory PART: the small cases under compute-sanitizer. racecheck and initcheck report kernels of cuBLAS and torch,
# too: of these two a report counts where it names a kernel of ours.
check_memory() {
  local tool
  if ! command -v compute-sanitizer >/dev/null; then check "$1" "compute-sanitizer is there" 5 false; return; fi
  # Without torch's cache every tensor is an allocation of its own, so that a byte beyond it is seen.
  for tool in memcheck synccheck; do
    check "$1" "$tool" 135 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" scripts/gpu_ops.py --small
  done
  for tool in racecheck initcheck; do
    check "$1" "$tool" 135 bash -c 'PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "$2" \
        scripts/gpu_ops.py --small 2>&1 | tee "$build/sanitizer.txt"
      grep -q "cases, 0 failed" "$build/sanitizer.txt" && ! grep -q "at .*xlstm::" "$build/sanitizer.txt"' - "$tool" "$python"
  done
}

if [ $built = 0 ]; then
  if wants conformance; then
    # A case that hangs or faults costs the other cases nothing: they are compared all the same.
    rm -f "$OUT/device.txt" "$OUT/emulator.txt"
    check conformance "primitives on the GPU" 120 "$build/bin/cuda_conformance" "$OUT/device.txt"
    check conformance "primitives in the emulator" 60 "$build/bin/host_conformance" "$OUT/emulator.txt"
    SHOW=40 check conformance "the same results" 60 "$python" tests/cuda/compare_conformance.py "$OUT/device.txt" \
      "$OUT/emulator.txt"
  fi
  if wants ops; then
    check_ops ops "all operators against float64" 200 "$python" scripts/gpu_ops.py --expect mlstm_sweep
    if "$python" -c 'import pytest' 2>/dev/null; then
      for file in tests/python/test_mlstm_cuda.py tests/python/test_slstm_cuda.py tests/python/test_pointwise_cuda.py; do
        check ops "$file" 200 "$python" -m pytest -q -p no:cacheprovider "$file"
      done
    else
      skip ops "tests/python/test_*_cuda.py: pytest is missing here"
    fi
  fi
  if wants sanitizer; then check_memory sanitizer; fi
  if wants hopper; then
    if [ "$capability" = 90 ]; then
      export XLSTM_HOPPER=1
      check_ops hopper "all operators against float64" 150 "$python" scripts/gpu_ops.py --expect _sm90
      check_memory hopper
      SHOW=60 check hopper "benchmark of the sm_90a kernels" 150 "$python" scripts/bench/gpu_mlstm.py \
        --no-peers --suites standard,tokens --seconds 0.3 --limit 90 --out "$OUT" --name gpu_mlstm_hopper
      unset XLSTM_HOPPER
    else
      skip hopper "compute capability 9.0 alone"
    fi
  fi
  if wants bench; then
    SHOW=150 check bench "mLSTM beside the peers" 560 "$python" scripts/bench/gpu_mlstm.py --seconds 0.4 --limit 400 --out "$OUT"
  fi
  if wants slstm; then
    SHOW=150 check slstm "sLSTM beside the peers" 560 "$python" scripts/bench/gpu_slstm.py --seconds 0.4 --limit 400 --out "$OUT"
  fi
fi

printf '\n== summary: %s\n' "${gpu#* }"
"$python" - "$results" "$OUT/summary.json" "${gpu#* }" <<'END'
import json
import sys

rows = [dict(zip(("part", "check", "result", "seconds"), line.rstrip("\n").split("\t"))) for line in open(sys.argv[1])]
for row in rows:
    row["seconds"] = int(row["seconds"])
    print(f"{row['result']:5} {row['part']:12} {row['seconds']:4} s  {row['check']}")
count = {result: sum(row["result"] == result for row in rows) for result in ("PASS", "FAIL", "SKIP")}
json.dump({"device": sys.argv[3], "count": count, "checks": rows}, open(sys.argv[2], "w"), indent=1)
print(f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped; details in {sys.argv[2]} and log.txt beside it")
sys.exit(count["FAIL"] > 0)
END
