# Shared by the scripts beside it; to be sourced from bash. Leaves the caller in the checkout's root.
#
# Environment: PYTHON (interpreter for new virtual environments), APAR_NATIVE (AUTO, REQUIRED or OFF),
# APAR_WERROR (ON: compiler warnings are errors).

unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$PWD
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf -- '-- %s\n' "$*"; }

fail() {
  printf -- 'error: %s\n' "$*" >&2
  exit 1
}

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# apt_install PACKAGE...: only as root on Debian and its kin.
apt_install() {
  say "installing $* with apt-get"
  apt-get -q update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "$@" >/dev/null
}

# Set `python` to an interpreter that APAR runs on.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      python=$candidate
      return
    fi
  done
  fail "APAR needs Python 3.10 or newer; '${PYTHON:-python3}' is $("${PYTHON:-python3}" --version 2>&1 || true). \
Install one and name it: PYTHON=/path/to/python3 $0"
}

# A C++ compiler builds the native kernels; without one APAR still runs its portable graph.
ensure_compiler() {
  [ "${APAR_NATIVE:-}" = OFF ] && return
  if [ -n "${CXX:-}" ] || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null; then
    return
  fi
  if can_apt && apt_install g++ libc6-dev; then
    return
  fi
  say "warning: no C++ compiler found, so the native kernels cannot be built (install g++ or set CXX)"
}

digest() { sha256sum | cut -d ' ' -f 1; }

# Digest of the files below the paths given.
digest_of() { find "$@" -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | digest; }

# The part of pyproject.toml that says what an environment holds.
requirements() { awk '/^\[/ { wanted = /^\[(build-system|project)/ } wanted' pyproject.toml; }

# use_venv FOLDER KEY: create the virtual environment, anew if it is broken, moved, or was made for another KEY, Python or
# list of requirements. Sets `venv_python` (run programs as `"$venv_python" -m NAME`) and `venv_fresh` (1: nothing installed yet).
use_venv() {
  venv=$root/$1
  venv_python=$venv/bin/python
  venv_key=$(printf '%s\n' "$venv" "$2" "$("$python" -VV)" "$(requirements)" | digest)
  venv_fresh=
  if [ "$(cat "$venv/.apar-key" 2>/dev/null)" = "$venv_key" ] && "$venv_python" -c 'import pip' 2>/dev/null; then
    return
  fi
  if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    can_apt && apt_install python3-venv || true
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
      fail "'$python' cannot make virtual environments; install its venv module (Debian and Ubuntu: apt-get install python3-venv)"
  fi
  say "creating the virtual environment $1 ($("$python" --version))"
  rm -rf -- "$venv"
  "$python" -m venv "$venv" || fail "cannot create $venv; is the folder writable for $(id -un)?"
  venv_fresh=1
}

# Everything asked for is installed: the next run may keep it.
seal_venv() { printf '%s\n' "$venv_key" >"$venv/.apar-key"; }

build_tools=("scikit-build-core>=1.0" cmake ninja)

pip_install() { "$venv_python" -m pip install -qq "$@" </dev/null; }

# install_apar KEY PIP-ARGUMENT...: install the checkout unless it is installed already with the same KEY.
install_apar() {
  local key
  key=$(printf '%s\n' "$1" "${ONNXRUNTIME_INCLUDE_DIR:-}" "${CXX:-$(command -v c++ || true)}" "${APAR_NATIVE:-}" \
    "${APAR_WERROR:-}" | digest)
  shift
  [ "$(cat "$venv/.apar-installed" 2>/dev/null)" = "$key" ] && return
  say "building and installing apar"
  rm -f -- "$venv/.apar-installed"
  # Without isolation and with a build folder for each environment, only what changed is compiled again.
  # Settings go by environment, since pip before 23.1 has no -C.
  SKBUILD_BUILD_DIR=build/${venv##*/.venv-} \
    SKBUILD_CMAKE_DEFINE="APAR_NATIVE=${APAR_NATIVE:-AUTO};APAR_WERROR=${APAR_WERROR:-OFF}" \
    pip_install --no-build-isolation "$@"
  printf '%s\n' "$key" >"$venv/.apar-installed"
  "$venv_python" -c 'import apar.plugins; apar.plugins.library_path()' 2>/dev/null ||
    say "note: built without the native kernels; for the reason run: rm -r ${venv##*/} && pip install -v ."
}

# fetch_tensorrt_bindings: the genuine Python bindings of TensorRT (2 MB, no TensorRT in them) for tests that hold our
# calls against them; without them those tests are skipped.
fetch_tensorrt_bindings() {
  local version folder found=
  [ -z "${TENSORRT_BINDINGS_DIR:-}" ] || return 0
  for version in 10.14.1.48.post1 11.1.0.106; do
    folder=$venv/tensorrt-bindings/$version
    if [ ! -d "$folder/tensorrt_bindings" ] &&
      ! pip_install --no-deps --target "$folder" "tensorrt-cu13-bindings==$version" 2>/dev/null; then
      say "note: TensorRT's bindings $version cannot be had here; tests that need them are skipped"
      rm -rf "$folder"
      continue
    fi
    found=${found:+$found:}$folder
  done
  export TENSORRT_BINDINGS_DIR=$found
}

# NVIDIA's Triton server from its wheel, in an environment of its own (.venv-triton). Quick where it is there already;
# fails with a sentence where it cannot be had.
install_triton() {
  "$venv_python" -m apar.runtime.serving.install_triton "$root/.venv-triton"
}

# Two runs at a time must not build in the same folder.
lock_build() {
  mkdir -p build
  if command -v flock >/dev/null; then
    exec 9>build/.lock
    flock -n 9 || { say "waiting for another run in this checkout"; flock 9; }
  fi
}

unlock_build() { exec 9>&-; }
