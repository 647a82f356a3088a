#!/usr/bin/env bash
# Trains a model and prints its text; sets up everything it needs first.
#
#   ./scripts/train.sh                                      the quickstart: a small model of Python source text
#   ./scripts/train.sh CONFIG.yaml [key.sub=value ...]      another run; also --dry-run, --print-config, --fresh, --help
#
# The last line is `held-out bits per byte: N.NN`. Run it again to continue an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup_environment "${RUNNER_PACKAGES[@]}"
# A first build takes the kernels for this machine alone; test.sh and pip build them for every instruction set.
variants=(); [ -e build/CMakeCache.txt ] || variants=(-DXLSTM_CPU_VARIANTS=native)
# CUDA kernels take minutes to build: only where a GPU is there to run them, or XLSTM_CUDA=ON asks for them.
cuda=${XLSTM_CUDA:-OFF}
if [ -z "${XLSTM_CUDA:-}" ] && nvidia-smi -L >/dev/null 2>&1; then cuda=AUTO; fi
build_project -DXLSTM_CUDA="$cuda" ${variants[@]+"${variants[@]}"} -- xlstm-train xlstm-generate xlstm-eval xlstm-data xlstm-bench xlstm_python
[ $# -gt 0 ] || set -- configs/runs/quickstart.yaml
say "xlstm-train $*"
exec build/bin/xlstm-train "$@"
