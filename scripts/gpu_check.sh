#!/usr/bin/env bash
# Checks and measures the CUDA kernels on this machine's GPU. Needs torch, nvcc, cmake and ninja, nothing else and no
# network. Leaves the GPU's settings alone.
#
#   ./scripts/gpu_check.sh [--only PART,PART...] [--built FOLDER]
#
# --built: what gpu_build.sh made, on another machine with the same torch. Then nothing is built here, and nvcc is not needed.
# Parts (seconds at most): build (900, always first), conformance (180: every primitive against the emulator), ops (300:
# all operators against float64), sanitizer (300: memcheck, synccheck and racecheck of compute-sanitizer on small shapes;
# skipped where it is missing), portable (300: both again with the kernels for sm_80, on compute capability 9.0, which has
# others), bench (560: scripts/bench/gpu_mlstm.py), slstm (560: gpu_slstm.py there). Checks run side by side, benchmarks
# alone behind them. A part that fails does not stop the others. OUT: folder of summary.json, log.txt and the benchmarks'
# files (default build/gpu_check). Both grow with every check: where this script is killed, "finished" in summary.json is
# false and running-*.txt have what was printed meanwhile. PYTHON: interpreter that has torch; BENCH, SLSTM: options of the
# benchmarks. Exit 0: all passed, 1: something failed, 2: nothing ran.
set -uo pipefail
parts='build conformance ops sanitizer portable bench slstm'
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
import json
import subprocess
import sys
from datetime import date

try:
    import torch
except ImportError:
    sys.exit("torch is not installed")
if torch.version.cuda is None:
    sys.exit("torch is built without CUDA")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
try:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
except (OSError, subprocess.SubprocessError):
    driver = "unknown"
major, minor = torch.cuda.get_device_capability()
machine = {"date": date.today().isoformat(), "device": torch.cuda.get_device_name(), "driver": driver,
           "torch": torch.__version__, "cuda": torch.version.cuda}
print(f"{major}{minor} {json.dumps(machine)}")
END
) || fail "no GPU to check: see the line above (python: $python; PYTHON picks another)"
capability=${gpu%% *} machine=${gpu#* }
[ "$capability" -ge 80 ] || fail "the kernels need compute capability 8.0 or later, not $capability: $machine"
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
[ -n "$built_elsewhere" ] || [ -x "$nvcc" ] || fail "nvcc was not found"
PATH=$(dirname "$nvcc"):$PATH
export PATH

built=${built_elsewhere:-$PWD/build/gpu/built}
OUT=${OUT:-$PWD/build/gpu_check}
mkdir -p "$OUT" "$built"
results=$OUT/results.txt
rm -f "$OUT"/running-*.txt
: >"$results"; : >"$OUT/log.txt"
wants() { [[ " $only " == *" $1 "* ]]; }
# summarise FINISHED: summary.json from what is recorded; printed where FINISHED is true, with exit 1 if anything failed.
summarise() {
  "$python" - "$results" "$OUT/summary.json" "$machine" "$1" <<'END'
import json
import os
import sys

results, summary, machine, finished = sys.argv[1:]
rows = [dict(zip(("part", "check", "result", "seconds"), line.rstrip("\n").split("\t"))) for line in open(results)]
rows.sort(key=lambda row: "build conformance ops sanitizer portable bench slstm".index(row["part"]))
rows = [{**row, "seconds": int(row["seconds"])} for row in rows]
count = {result: sum(row["result"] == result for row in rows) for result in ("PASS", "FAIL", "SKIP")}
with open(summary + ".new", "w") as file:
    json.dump({**json.loads(machine), "finished": finished == "true", "count": count, "checks": rows}, file, indent=1)
os.replace(summary + ".new", summary)
if finished == "true":
    for row in rows:
        print(f"{row['result']:5} {row['part']:12} {row['seconds']:4} s  {row['check']}")
    print(f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped; details in {summary} and log.txt beside it")
    sys.exit(count["FAIL"] > 0)
END
}
# record PART NAME RESULT SECONDS, one at a time: under check.lock
record() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$results"
  printf '%-5s %s: %s (%s s)\n' "$3" "$1" "$2" "$4"
  summarise false
}
# check PART NAME LIMIT COMMAND...: one line of result; what the command prints goes to the log, its end is shown.
check() {
  local part=$1 name=$2 limit=$3 status=PASS begin=$SECONDS code output
  shift 3
  output=$(mktemp "$OUT/running-$part-XXXXXX.txt")
  timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1
  code=$?
  [ $code = 0 ] || status=FAIL
  {
    flock 9
    printf '\n== %s: %s\n' "$part" "$name" | tee -a "$OUT/log.txt"
    cat "$output" >>"$OUT/log.txt"
    if [ $code = 124 ] || [ $code = 137 ]; then echo "stopped after $limit s" | tee -a "$OUT/log.txt"; fi
    tail -n "${SHOW:-6}" "$output" | cut -c1-200
    record "$part" "$name" $status $((SECONDS - begin))
  } 9>"$OUT/check.lock"
  rm -f "$output"
  [ $status = PASS ]
}
# skip PART WHY
skip() {
  {
    flock 9
    printf '\n'
    record "$1" "$2" SKIP 0
  } 9>"$OUT/check.lock"
}

export python
build_here() { PYTHON=$python XLSTM_CPU_VARIANTS=native scripts/gpu_build.sh "$built" "$capability" "$1"; }
export -f build_here
export built capability
if [ -n "$built_elsewhere" ]; then
  SHOW=1 check build "operators built elsewhere" 60 env PYTHONSAFEPATH=1 PYTHONPATH="$built/python" "$python" -c \
    'import libxlstm; print(libxlstm.__file__)'
else
  SHOW=3 check build "operators and conformance programs" 540 bash -c 'build_here operators'
fi
ready=$?
sanitizer_is_there() { command -v compute-sanitizer >/dev/null; }
if [ $ready = 0 ] && [ -z "$built_elsewhere" ] && sanitizer_is_there &&
  { wants sanitizer || { wants portable && [ "$capability" = 90 ]; }; }; then
  SHOW=3 check build "operators for racecheck" 360 bash -c 'build_here racecheck'
fi
# The operators just built, not those of another build in this tree.
export PYTHONSAFEPATH=1 PYTHONPATH=$built/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=INFO
# Checks run side by side: threads of all of them that wait in loops for each other would take the cores away.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 7) / 8))} OMP_WAIT_POLICY=passive

# check_ops PART NAME LIMIT COMMAND...: the operators, by the kernels and not by the generic path.
kernels_ran() {
  local status kernels
  said=$(mktemp) && trap 'rm -f "$said"' EXIT
  "$@" 2>&1 | tee "$said"  # at once: nothing is lost where this is stopped
  status=${PIPESTATUS[0]}
  for kernels in mlstm mlstm_step_inputs slstm gated_linear_attention causal_conv1d headwise_norm residual_norm block_linear \
    linear_int8 linear_cross_entropy; do
    { grep -qF "$kernels: kernels for CUDA" "$said" && ! grep -qF "$kernels: generic path" "$said"; } ||
      { echo "not every call of $kernels was taken by the kernels"; status=1; }
  done
  return "$status"
}
# sanitized TOOL: the small cases under a tool of compute-sanitizer, judged by what the two say: with which status Python ends
# is not the kernels' doing.
sanitized() {
  said=$(mktemp) && trap 'rm -f "$said"' EXIT
  compute-sanitizer --tool "$1" --print-limit 1000 "$python" scripts/gpu_ops.py --small 2>&1 | tee "$said"
  grep -qF "cases, 0 failed" "$said" || return 1
  case $1 in
    # It reports kernels of cuBLAS, too: a report counts where it names a kernel of ours.
    racecheck) grep -qF "RACECHECK SUMMARY" "$said" && ! grep -q "at .*xlstm::" "$said" ;;
    *) grep -qF "ERROR SUMMARY: 0 errors" "$said" ;;
  esac
}
export -f kernels_ran sanitized
check_ops() { check "$1" "$2" "$3" bash -c 'kernels_ran "$@"' - "${@:4}"; }

# check_memory PART: the small cases under compute-sanitizer. initcheck is not among its tools: it does not see what the copy
# engine writes and reports torch's sums of cuBLAS's results.
check_memory() {
  local tool
  if ! sanitizer_is_there; then skip "$1" "compute-sanitizer is missing here"; return; fi
  # Without torch's cache every tensor is an allocation of its own, so that a byte beyond it is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck synccheck; do
    check "$1" "$tool" 150 bash -c 'sanitized "$1"' - "$tool" &
  done
  PYTHONPATH=$built/racecheck:$PYTHONPATH check "$1" racecheck 200 bash -c 'sanitized racecheck' &
}

check_conformance() {
  # A case that hangs or faults costs the other cases nothing: they are compared all the same.
  rm -f "$OUT/device.txt" "$OUT/emulator.txt"
  check conformance "primitives on the GPU" 120 "$built/bin/cuda_conformance" "$OUT/device.txt"
  check conformance "primitives in the emulator" 60 "$built/bin/host_conformance" "$OUT/emulator.txt"
  SHOW=40 check conformance "the same results" 60 "$python" tests/cuda/compare_conformance.py "$OUT/device.txt" \
    "$OUT/emulator.txt"
}

# check_suites PART FILE...
check_suites() {
  local part=$1 file
  shift
  if ! "$python" -c 'import pytest' 2>/dev/null; then skip "$part" "$*: pytest is missing here"; return; fi
  # In two processes each where pytest-xdist is there: they wait for float64 on the CPU.
  local processes=()
  if "$python" -c 'import xdist' 2>/dev/null; then processes=(-n 2); fi
  for file in "$@"; do
    check "$part" "$file" 250 "$python" -m pytest -q -p no:cacheprovider "${processes[@]}" "$file" &
  done
}

if [ $ready = 0 ]; then
  expected=mlstm_sweep
  [ "$capability" = 90 ] && expected=_sm90
  if wants conformance; then check_conformance & fi
  if wants ops; then
    check_ops ops "all operators against float64" 200 "$python" scripts/gpu_ops.py --expect $expected &
    check_suites ops tests/python/test_{mlstm,slstm,pointwise,gated,baselines}_cuda.py
  fi
  if wants sanitizer; then (check_memory sanitizer; wait) & fi
  if wants portable; then
    if [ "$capability" = 90 ]; then
      (
        export XLSTM_HOPPER=0
        check_ops portable "all operators against float64" 200 "$python" scripts/gpu_ops.py --expect mlstm_sweep &
        check_suites portable tests/python/test_{mlstm,slstm}_cuda.py
        (check_memory portable; wait) &
        wait
      ) &
    else
      skip portable "compute capability 9.0 alone has other kernels"
    fi
  fi
  wait
  if wants bench; then
    SHOW=150 check bench "mLSTM beside the peers" 560 "$python" scripts/bench/gpu_mlstm.py --seconds 0.4 --limit 400 \
      --out "$OUT" ${BENCH:-}
  fi
  if wants slstm; then
    SHOW=150 check slstm "sLSTM beside the peers" 560 "$python" scripts/bench/gpu_slstm.py --seconds 0.4 --limit 400 \
      --out "$OUT" ${SLSTM:-}
  fi
fi

printf '\n== summary: %s\n' "$machine"
summarise true
