#!/usr/bin/env bash
# Runs all tests; sets up everything they need first. Closes with `N passed, N failed, N skipped`.
#
#   ./scripts/test.sh                  all C++ tests (CTest) and Python tests (pytest)
#   ./scripts/test.sh --label NAME     one part: simt cuda core ops nn models data config train python faults
#   ./scripts/test.sh --faults         the long fault suite: kill -9, flipped bits, full disks, signals
set -euo pipefail
labels='simt cuda core ops nn models data config train python faults'
label= faults=short
while [ $# -gt 0 ]; do
  case $1 in
    --label) label=${2:-}; [[ " $labels " == *" $label "* ]] || { echo "error: --label takes one of: $labels" >&2; exit 2; }; shift 2 ;;
    --faults) faults=full; label=faults; shift ;;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
done
cd "$(dirname "$0")/.."
. scripts/setup.sh
WITH_TESTS=1
setup_environment "${RUNNER_PACKAGES[@]}" \
  pytest pytest-xdist zstandard nvidia-cuda-nvdisasm==13.2.86 clang-format==14.0.6 xlstm==2.0.6 mlstm_kernels==2.0.6 flashrnn==1.0.8 transformers==5.23.0 rwkv==0.8.32
build_project -DXLSTM_BUILD_TESTS=ON -DXLSTM_CPU_VARIANTS=all -DXLSTM_CUDA="${XLSTM_CUDA:-AUTO}"

rm -rf build/junit; mkdir -p build/junit
status=0
if [[ -z $label || ! " python faults " == *" $label "* ]]; then
  say "C++ tests"
  ctest --test-dir build -j2 --output-on-failure --no-tests=ignore --output-junit junit/ctest.xml \
    ${label:+-L "^$label\$"} || status=1
fi
run_pytest() {  # folder [option ...]
  say "Python tests: $1"
  PYTHONPATH=$PWD "$VENV/bin/python" -m pytest -q -p no:cacheprovider --durations=5 --junitxml="build/junit/py-$(basename "$1").xml" "$@" || status=1
}
# One process per core, a file's tests in one of them: most tests wait for programs that they start. The fault suite chooses
# its moments by the time that a run takes, and has the machine to itself.
processes=$(($(nproc) < 8 ? $(nproc) : 8))
if [[ -z $label || $label == python ]]; then OMP_WAIT_POLICY=passive run_pytest tests/python -n "$processes" --dist loadfile; fi
if [[ -z $label || $label == faults ]]; then XLSTM_FAULTS=$faults run_pytest tests/faults; fi
say "summary"
"$VENV/bin/python" scripts/test_summary.py build/junit || status=1
exit $status
