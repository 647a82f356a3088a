# Sourced by train.sh and test.sh: everything a fresh machine needs, done once and skipped afterwards.
#   setup_environment [pip requirement ...]   distribution packages, .venv with torch and the given packages
#   build_project [cmake option ...] -- [target ...]   configures build/ and builds with ninja
# TORCH_VERSION picks another torch (2.11 or newer); PYTHON another interpreter.

TORCH_VERSION=${TORCH_VERSION:-2.15.0}
# What training, plots, tokenizers, conversions and the experiments' runner need besides torch.
RUNNER_PACKAGES=(numpy matplotlib safetensors tokenizers pyyaml)
VENV=$PWD/.venv

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# command or header -> Debian/Ubuntu package. A thing that is present, from wherever, needs no package.
missing_packages() {
  local need=()
  command -v g++ >/dev/null || need+=(g++)
  command -v cmake >/dev/null || need+=(cmake)
  command -v ninja >/dev/null || need+=(ninja-build)
  command -v ccache >/dev/null || need+=(ccache)
  command -v git >/dev/null || need+=(git)
  local python=${PYTHON:-python3}
  if ! command -v "$python" >/dev/null; then
    need+=(python3 python3-venv python3-dev)
  else
    "$python" -c 'import ensurepip' 2>/dev/null || need+=(python3-venv)
    "$python" -c 'import sysconfig,os,sys; sys.exit(not os.path.exists(sysconfig.get_paths()["include"]+"/Python.h"))' || need+=(python3-dev)
  fi
  have_header yaml-cpp/yaml.h || need+=(libyaml-cpp-dev)
  have_header spdlog/spdlog.h || need+=(libspdlog-dev)
  have_header nlohmann/json.hpp || need+=(nlohmann-json3-dev)
  have_header zstd.h || need+=(libzstd-dev)
  have_header zlib.h || need+=(zlib1g-dev)
  have_header openssl/evp.h || need+=(libssl-dev)
  if [ "${WITH_TESTS:-0}" = 1 ]; then
    have_header catch2/catch.hpp || have_header catch2/catch_all.hpp || need+=(catch2)
  fi
  [ ${#need[@]} = 0 ] || printf '%s\n' "${need[@]}"
}

have_header() {
  local folder
  local path=${CPATH:-}
  for folder in ${path//:/ } /usr/include /usr/local/include /usr/include/"$(uname -m)"-linux-gnu; do
    [ -e "$folder/$1" ] && return 0
  done
  return 1
}

install_packages() {
  local list need
  list=$(missing_packages)
  [ -n "$list" ] || return 0
  mapfile -t need <<<"$list"
  local how="apt-get install ${need[*]}"
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    printf 'error: these packages are missing and cannot be installed from here: %s\n' "${need[*]}" >&2
    printf 'As an administrator: %s   (Debian and Ubuntu names; other systems have the same libraries under similar names)\n' "$how" >&2
    exit 1
  fi
  say "installing ${need[*]}"
  apt-get update -qq
  # The virtual environment can be filled while the compilers are unpacked.
  local first=() rest=() package
  for package in "${need[@]}"; do
    case $package in python3|python3-venv) first+=("$package") ;; *) rest+=("$package") ;; esac
  done
  if [ ${#first[@]} -gt 0 ]; then apt_install "${first[@]}"; fi
  if [ ${#rest[@]} -gt 0 ]; then apt_install "${rest[@]}" & apt_job=$!; fi
}

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$LOGS/apt.log" 2>&1 ||
    { tail -n 20 "$LOGS/apt.log" >&2; return 1; }
}

setup_environment() {
  LOGS=$PWD/build/logs; mkdir -p "$LOGS"
  apt_job=
  install_packages
  if [ ! -x "$VENV/bin/python" ]; then
    say "making the virtual environment .venv"
    "${PYTHON:-python3}" -m venv "$VENV" || die "cannot make .venv; python3-venv is needed (apt-get install python3-venv)"
  fi
  local wanted=("torch==$TORCH_VERSION" "$@") stamp=$VENV/.libxlstm-packages
  if ! [ -e "$stamp" ] || [ -n "$(comm -23 <(printf '%s\n' "${wanted[@]}" | sort) <(sort "$stamp"))" ]; then
    say "installing torch $TORCH_VERSION and $# Python packages (about 3 GB the first time)"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off -q "${wanted[@]}" ||
      die "pip failed; the lines above say why. Run the same command again once that is mended."
    { printf '%s\n' "${wanted[@]}"; cat "$stamp" 2>/dev/null; } | sort -u >"$stamp.tmp" && mv "$stamp.tmp" "$stamp"
  fi
  if [ -n "$apt_job" ]; then wait "$apt_job" || die "apt-get failed (build/logs/apt.log)"; fi
  export XLSTM_PYTHON=$VENV/bin/python
}

build_project() {
  local options=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
  [ $# -gt 0 ] && shift
  export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
  say "building (build/)"
  # Named, because an earlier configuration of build/ may have cached other values.
  cmake -S . -B build -G Ninja -DPython3_EXECUTABLE="$VENV/bin/python" -DCMAKE_BUILD_TYPE=Release \
    -DXLSTM_BUILD_TRAIN=ON -DXLSTM_BUILD_PYTHON=ON "${options[@]}" >"$LOGS/cmake.log" 2>&1 ||
    { tail -n 30 "$LOGS/cmake.log" >&2; die "cmake failed (build/logs/cmake.log)"; }
  ninja -C build "$@" || die "the build failed; the first error above says where"
}
