#!/usr/bin/env bash
# Builds what gpu_check.sh runs, on any machine with torch (of CUDA), nvcc, cmake and ninja: it needs no GPU and no network.
# FOLDER can be copied to a machine with the GPU, where `gpu_check.sh --built FOLDER` needs neither nvcc nor time.
#
#   ./scripts/gpu_build.sh FOLDER CAPABILITY [operators] [racecheck]
#
# CAPABILITY: which GPU, by its compute capability without a point (80, 90, 120). operators: FOLDER/python/libxlstm and
# the conformance programs in FOLDER/bin. racecheck: FOLDER/racecheck/libxlstm, slower kernels that compute-sanitizer's tool
# of that name can follow. Without a name both are built, in build/gpu. PYTHON: interpreter whose torch it is built for,
# which must be that of the other machine. XLSTM_CPU_VARIANTS=native: for this machine's processor alone, sooner.
set -euo pipefail
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0; fi
[ $# -ge 2 ] || fail "gpu_build.sh takes a folder and a compute capability (see --help)"
[[ $2 =~ ^[0-9]+$ ]] || fail "the compute capability is a number without a point, as 90, not $2"
[ "$2" -ge 80 ] || fail "the kernels need compute capability 8.0 or later, not $2"
mkdir -p "$1"
folder=$(realpath "$1") capability=$2
shift 2
[ $# -gt 0 ] || set -- operators racecheck
for what in "$@"; do
  [[ $what == operators || $what == racecheck ]] || fail "unknown argument $what; there are: operators, racecheck"
done
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
python=$(command -v "$python") || fail "there is no ${PYTHON:-python3}; PYTHON names the interpreter that has torch"
[[ $python == /* ]] || python=$PWD/$python
case $capability in
  80) architectures=80-real ;;
  90) architectures='80-real;90a-real' ;;
  *) architectures="80-real;$capability-real" ;;
esac

# build TREE INSTALLED OPTION...
build() {
  rm -f "$1/CMakeCache.txt"  # it has the libraries of the torch it was made with
  cmake -S . -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE="$python" \
    -DXLSTM_CUDA=ON -DXLSTM_CUDA_ARCHITECTURES="$architectures" -DXLSTM_CPU_VARIANTS="${XLSTM_CPU_VARIANTS:-all}" \
    -DXLSTM_BUILD_TRAIN=OFF -DXLSTM_BUILD_PYTHON=OFF -DXLSTM_BUILD_TESTS=OFF -DXLSTM_WERROR=OFF "${@:3}"
  ninja -C "$1"
  cmake --install "$1" --prefix "$2"
  cp -R libxlstm/*.py libxlstm/accelerated "$2/libxlstm/"
}
for what in "$@"; do
  tree=$PWD/build/gpu/$what
  if [ "$what" = operators ]; then
    build "$tree" "$folder/python" -DXLSTM_BUILD_CONFORMANCE=ON
    mkdir -p "$folder/bin"
    cp "$tree/bin/cuda_conformance" "$tree/bin/host_conformance" "$folder/bin/"
  else
    build "$tree" "$folder/racecheck" -DXLSTM_RACECHECK=ON
  fi
done
