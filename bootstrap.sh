#!/usr/bin/env bash
# Sets up, builds, and runs the demo or the tests, from a fresh Debian 12 or Ubuntu 24.04.
# Everything it fetches or makes lies in this checkout (.deps, .ccache, build); outside of
# it only system packages are installed. A second run fetches nothing.
set -euo pipefail

readonly torch_version=2.11.0 # the pinned packages below are what this wheel's metadata asks for
readonly cuda_release=13.0
readonly runtime_packages=(nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
readonly toolkit_packages=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96)
readonly cuda_packages=(nvidia-cublas==13.1.0.3 nvidia-cuda-nvrtc==13.0.88 nvidia-cufft==12.0.0.61
  nvidia-cufile==1.15.1.6 nvidia-curand==10.4.0.35 nvidia-cusolver==12.0.4.66
  nvidia-cusparse==12.6.3.3 nvidia-nvjitlink==13.0.88 nvidia-nvtx==13.0.85
  nvidia-cudnn-cu13==9.19.0.56 nvidia-cusparselt-cu13==0.8.0 nvidia-nccl-cu13==2.28.9
  nvidia-nvshmem-cu13==3.4.5)
readonly system_libraries=(libtbb-dev libyaml-cpp-dev libspdlog-dev doctest-dev nlohmann-json3-dev
  libcli11-dev libpcre2-dev libjs-chart.js libbenchmark-dev)
readonly browsers=(chromium-headless-shell chromium chromium-browser google-chrome) # the first is Debian's package
readonly mib_per_job=1536 # compiling a file that includes libtorch takes about 1.5 GB

usage() {
  cat <<'USAGE'
Usage: ./bootstrap.sh COMMAND [OPTION]...

Commands
  demo            install what is missing, build, and run the demo
  test            install what is missing, build, and run every test
  build           install what is missing, and build
  help            print this text

Options
  --cuda          build for CUDA too, and get what that needs (the default if nvidia-smi finds a GPU)
  --cpu           build for the CPU only
  --libtorch DIR  use this libtorch 2.11, the folder that holds include/ and lib/ (or: LIBTORCH=DIR);
                  for Python's torch that is .../site-packages/torch
  --jobs N        compile N files at once (default: as many as cores and memory allow)
  --no-install    install no system packages; stop with a list if one is missing

Downloads go to .deps inside this checkout: about 530 MB for the CPU, another 105 MB for a CUDA
compiler where none is installed, and, on a machine with a GPU, another 2 GB of CUDA libraries
(on disk 0.5 GB, 1.3 GB and 3.8 GB). An existing torch, given by LIBTORCH, is used in place.
Exit codes: 0 success, 1 failure, 2 a mistake in the command line.
USAGE
}

# ---- saying what happens ---------------------------------------------------------------------

stage=start
now() { printf '%s' "${EPOCHREALTIME/[.,]/}"; } # microseconds; the separator follows the locale
since() { local us=$(($(now) - $1)); printf '%d.%d s' $((us / 1000000)) $((us / 100000 % 10)); }
begin() { stage=$1 stage_start=$(now); printf '==> %s\n' "$1"; }
note() { printf '    %s\n' "$*"; }
finish() { printf '    %s: %s\n' "$stage" "$(since "$stage_start")"; }
die() { printf 'bootstrap.sh: %s: %s\n' "$stage" "$*" >&2; exit 1; }
usage_error() { printf 'bootstrap.sh: %s\nTry: ./bootstrap.sh help\n' "$*" >&2; exit 2; }

# ---- the command line ------------------------------------------------------------------------

parse_command_line() {
  command='' cuda=auto libtorch=${LIBTORCH:-} jobs='' install=yes
  while (($#)); do
    case $1 in
      demo | test | build)
        [[ -z $command ]] || usage_error "two commands: $command and $1"
        command=$1 ;;
      help | -h | --help) usage; exit 0 ;;
      --cuda | --cpu)
        [[ $cuda == auto || $cuda == "${1#--}" ]] || usage_error "--cuda and --cpu exclude each other"
        cuda=${1#--} ;;
      --no-install) install=no ;;
      --libtorch | --jobs)
        (($# >= 2)) || usage_error "$1 needs a value"
        if [[ $1 == --jobs ]]; then jobs=$2; else libtorch=$2; fi
        shift ;;
      *) usage_error "unknown argument: $1" ;;
    esac
    shift
  done
  [[ -n $command ]] || usage_error "no command: give demo, test or build"
  [[ -z $jobs || $jobs =~ ^[1-9][0-9]{0,3}$ ]] || usage_error "--jobs takes a number from 1: $jobs"
  if [[ -n $libtorch ]]; then
    [[ -d $libtorch ]] || usage_error "LIBTORCH is not a folder: $libtorch"
    libtorch=$(cd "$libtorch" && pwd)
  fi
}

# ---- what is here, and what is missing -------------------------------------------------------

# No `| grep -q` in here: it ends at the first match, what writes into the pipe may die of that, and pipefail then
# calls the match a failure.
has_gpu() { command -v nvidia-smi >/dev/null && [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }
can_be_loaded() { [[ $(ldd "$1") != *'not found'* ]]; }

# Prints the major and minor version that DIR's headers state, nothing if they are not there.
libtorch_version() {
  local header
  for header in "$1"/include/torch/{headeronly,csrc/api/include/torch}/version.h; do
    [[ -f $header ]] || continue
    sed -nE 's/^#define TORCH_VERSION_(MAJOR|MINOR) ([0-9]+).*/\2/p' "$header" | paste -sd.
    return
  done
}

check_given_libtorch() {
  local version
  [[ -f $libtorch/lib/libtorch_cpu.so ]] ||
    die "$libtorch holds no lib/libtorch_cpu.so; give the folder that holds include/ and lib/"
  version=$(libtorch_version "$libtorch")
  [[ $version == "${torch_version%.*}" ]] ||
    die "$libtorch is libtorch ${version:-of unknown version}, this needs ${torch_version%.*}.*;" \
      "install that one, or leave LIBTORCH out and it is fetched"
  [[ $cuda == yes && ! -f $libtorch/lib/libtorch_cuda.so ]] || return 0
  [[ $cuda_asked == auto ]] ||
    die "$libtorch has no CUDA (lib/libtorch_cuda.so is missing); give one that has, or leave --cuda out"
  note "$libtorch has no CUDA: building for the CPU only"
  cuda=no
}

# Finds an nvcc that is new enough for libtorch's CUDA; else nvcc is empty.
find_nvcc() {
  local candidate release
  nvcc=''
  for candidate in "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    [[ -x $candidate ]] || continue
    release=$("$candidate" --version | sed -nE 's/.*release ([0-9]+\.[0-9]+).*/\1/p')
    if [[ $(printf '%s\n' "$cuda_release" "$release" | sort -V | head -n1) == "$cuda_release" ]]; then
      nvcc=$(readlink -f "$candidate")
      return
    fi
    note "$candidate is CUDA ${release:-?}, $cuda_release or newer is needed: not used"
  done
}

stamped() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# Decides between what is there and what to fetch, without the network. Sets the names of the
# folders that the build reads, and fetch=libtorch|toolkit|NAME==VERSION... for what is missing.
plan() {
  local package wanted=("${runtime_packages[@]}")
  fetch=() runtime_folders=() nvcc=''
  [[ $cuda$gpu != yesyes ]] || wanted+=("${cuda_packages[@]}")
  if [[ -n $libtorch ]]; then
    note "libtorch: $libtorch"
    # Python's torch has them in packages beside it, the stand-alone one in its own folder,
    # and one that was built for the CPU alone needs none.
    if [[ -d $libtorch/../nvidia/cu13/lib ]]; then
      for package in "$libtorch"/../nvidia/*/lib; do runtime_folders+=("$(cd "$package" && pwd)"); done
      wanted=()
    elif compgen -G "$libtorch/lib/libcudart*" >/dev/null || ! grep -q libcudart "$libtorch/lib/libtorch_cpu.so"; then
      runtime_folders=("$libtorch/lib") wanted=()
    fi
  else
    # Its run path covers ../nvidia, in .deps as in site-packages.
    libtorch=$PWD/.deps/libtorch
    stamped "$libtorch/.stamp" "$torch_version cuda" ||
      { [[ $cuda == no ]] && stamped "$libtorch/.stamp" "$torch_version cpu"; } || fetch+=(libtorch)
  fi
  for package in ${wanted[@]+"${wanted[@]}"}; do
    [[ -f .deps/nvidia/.stamps/$package ]] || fetch+=("$package")
  done
  if [[ $cuda == yes ]]; then
    find_nvcc
    [[ -n $nvcc ]] || stamped .deps/cuda/.stamp "${toolkit_packages[*]}" || fetch+=(toolkit)
  fi
}

find_python() {
  local candidate
  python=''
  for candidate in python3 /usr/bin/python3; do
    if "$candidate" -m pip --version >/dev/null 2>&1; then python=$(command -v "$candidate"); return; fi
  done
}

# ---- system packages -------------------------------------------------------------------------

installed() { [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

as_root() {
  if ((EUID == 0)); then env DEBIAN_FRONTEND=noninteractive "$@"; else sudo env DEBIAN_FRONTEND=noninteractive "$@"; fi
}
apt_install() {
  as_root apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" >"$scratch/apt.log" 2>&1
}

# What only the test of the report's page needs. Where it cannot be had (Ubuntu has no Chromium as a package), that
# test says so and is skipped.
install_test_packages() {
  begin "packages for tests"
  local browser missing=()
  for browser in "${browsers[@]}"; do command -v "$browser" >/dev/null && break; done
  command -v "$browser" >/dev/null || missing+=("${browsers[0]}")
  /usr/bin/python3 -c 'import jsonschema' 2>/dev/null || missing+=(python3-jsonschema)
  if ((${#missing[@]} == 0)); then
    note "nothing is missing"
  elif [[ $install == no ]]; then
    note "missing, and --no-install was given: ${missing[*]}; the report's test is skipped or checks less"
  else
    note "installing: ${missing[*]}"
    as_root apt-get -qq update || note "apt-get update had errors; trying with the lists that are here"
    for browser in "${missing[@]}"; do
      apt_install "$browser" || note "$browser cannot be had here; the report's test is skipped or checks less"
    done
  fi
  finish
}

install_system_packages() {
  begin "system packages"
  local tool package missing=()
  for tool in g++:g++ cmake:cmake ninja:ninja-build ccache:ccache pkg-config:pkg-config; do
    command -v "${tool%%:*}" >/dev/null || missing+=("${tool#*:}")
  done
  find_python
  ((${#fetch[@]} == 0)) || [[ -n $python ]] || missing+=(python3-pip ca-certificates)
  if command -v dpkg-query >/dev/null; then
    for package in "${system_libraries[@]}"; do installed "$package" || missing+=("$package"); done
  else
    note "no dpkg here, so libraries are not checked: ${system_libraries[*]}"
  fi
  if ((${#missing[@]} == 0)); then
    note "nothing is missing"
  else
    [[ $install == yes ]] || die "missing (and --no-install was given): ${missing[*]}"
    command -v apt-get >/dev/null ||
      die "missing, and there is no apt-get here to install it: ${missing[*]}"
    ((EUID == 0)) || command -v sudo >/dev/null ||
      die "installing needs root or sudo, and neither is here; ask for: apt-get install ${missing[*]}"
    note "installing: ${missing[*]}"
    as_root apt-get -qq update || note "apt-get update had errors; trying with the lists that are here"
    apt_install "${missing[@]}" ||
      { tail -n 20 "$scratch/apt.log" >&2; die "apt-get install failed (on Ubuntu, 'universe' must be enabled)"; }
    find_python
  fi
  finish
}

# ---- downloads -------------------------------------------------------------------------------

# Downloads NAME==VERSION and sets wheel. The platform is spelled out, so that the wheel does not
# depend on which Python runs pip. pip compares it with the index's checksum.
download() {
  local minor platforms=(--platform manylinux2014_x86_64) folder
  for minor in {17..36}; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  folder=$(mktemp -d "$scratch/wheel.XXXXXX")
  note "fetching $1"
  TMPDIR=$scratch PYTHONDONTWRITEBYTECODE=1 "$python" -m pip download --quiet --no-deps --no-cache-dir \
    --disable-pip-version-check --only-binary=:all: --implementation cp --python-version 3.12 \
    "${platforms[@]}" --dest "$folder" "$1" || die "could not download $1"
  wheel=$(echo "$folder"/*.whl)
}

# unpack DIR PATTERN...: the members of $wheel that match a pattern; the wheel is deleted.
unpack() {
  "$python" - "$wheel" "$@" <<'PYTHON' || die "could not unpack $wheel (is the disk full?)"
import fnmatch, os, sys, zipfile
wheel, folder, *patterns = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    for member in archive.infolist():
        if any(fnmatch.fnmatchcase(member.filename, pattern) for pattern in patterns):
            path = archive.extract(member, folder)
            os.chmod(path, member.external_attr >> 16 & 0o755 | 0o644 if not member.is_dir() else 0o755)
os.remove(wheel)
PYTHON
}

fetch_libtorch() {
  local kind=cpu lib libs=(libtorch_cpu libc10 libgomp) patterns=('torch/include/*')
  if [[ $cuda == yes ]]; then
    kind=cuda libs+=(libtorch libtorch_cuda libc10_cuda libtorch_cuda_linalg libtorch_nvshmem libcaffe2_nvrtc)
  fi
  for lib in "${libs[@]}"; do patterns+=("torch/lib/$lib.so*"); done
  download "torch==$torch_version"
  unpack "$scratch/libtorch" "${patterns[@]}"
  echo "$torch_version $kind" >"$scratch/libtorch/torch/.stamp"
  rm -rf .deps/libtorch
  mv "$scratch/libtorch/torch" .deps/libtorch
}

fetch_toolkit() {
  local package library
  for package in "${toolkit_packages[@]}"; do
    download "$package"
    unpack "$scratch/toolkit" 'nvidia/cu13/*'
  done
  local root=$scratch/toolkit/nvidia/cu13
  # The packages leave out the names that a linker looks for.
  for library in "$root"/lib/*.so.*; do ln -s "${library##*/}" "${library%%.so.*}.so"; done
  ln -s lib "$root/lib64"
  echo "${toolkit_packages[*]}" >"$root/.stamp"
  rm -rf .deps/cuda
  mv "$root" .deps/cuda
}

# The packages share folders, so one is linked in file by file; its stamp comes last.
fetch_cuda_libraries() {
  local package=$1
  download "$package"
  unpack "$scratch/$package" 'nvidia/*/lib/*.so*'
  rm -f "$scratch/$package"/nvidia/cu13/lib/libnvperf_* # profiler parts, 38 MB, that libtorch never loads
  cp -rlf "$scratch/$package/nvidia" .deps
  rm -rf "${scratch:?}/$package"
  mkdir -p .deps/nvidia/.stamps
  touch ".deps/nvidia/.stamps/$package"
}

fetch_missing() {
  begin "libraries in .deps"
  ((${#fetch[@]})) || note "nothing is missing"
  local item
  for item in ${fetch[@]+"${fetch[@]}"}; do
    case $item in
      libtorch | toolkit) "fetch_$item" ;;
      *) fetch_cuda_libraries "$item" ;;
    esac
  done
  if ((${#runtime_folders[@]} == 0)); then
    for item in .deps/nvidia/*/lib; do runtime_folders+=("$PWD/$item"); done
  fi
  [[ $cuda != yes || -n $nvcc ]] || nvcc=$PWD/.deps/cuda/bin/nvcc
  finish
}

# ---- build and run ---------------------------------------------------------------------------

# As many jobs as cores and the memory that is free (also the container's limit) allow.
default_jobs() {
  local available_kib limit by_memory cores
  available_kib=$(sed -nE 's/^MemAvailable: +([0-9]+) kB/\1/p' /proc/meminfo)
  for limit in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
    [[ -r $limit && $(<"$limit") =~ ^[0-9]{1,15}$ ]] || continue
    ((available_kib <= $(<"$limit") / 1024)) || available_kib=$(($(<"$limit") / 1024))
  done
  by_memory=$((available_kib / 1024 / mib_per_job))
  cores=$(nproc)
  jobs=$((by_memory < 1 ? 1 : by_memory < cores ? by_memory : cores))
}

# build NAME ON|OFF: configures and builds build/NAME.
build() {
  begin "build/$1"
  local arguments=(-G Ninja -DCMAKE_BUILD_TYPE=Release "-DLIGHTER_LIBTORCH=$libtorch"
    "-DLIGHTER_CUDA_RUNTIME_LIBS=$(IFS=';'; echo "${runtime_folders[*]}")" "-DLIGHTER_CUDA=$2"
    -DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
  if [[ $2 == ON ]]; then
    arguments+=("-DCMAKE_CUDA_COMPILER=$nvcc" "-DCUDAToolkit_ROOT=${nvcc%/bin/nvcc}"
      -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
    note "CUDA compiler: $nvcc"
  fi
  [[ -z $python ]] || arguments+=("-DLIGHTER_PYTHON=$python")
  cmake -S . -B "build/$1" "${arguments[@]}" >"$scratch/cmake.log" 2>&1 ||
    { cat "$scratch/cmake.log" >&2; rm -f "build/$1/CMakeCache.txt"; die "cmake failed"; }
  note "ninja with $jobs jobs"
  ninja -C "build/$1" -j "$jobs" || die "the build failed"
  built=build/$1
  finish
}

build_all() {
  [[ -n $jobs ]] || default_jobs
  # A cache in the checkout; the sloppiness is what ccache asks for with precompiled headers.
  export CCACHE_DIR=$PWD/.ccache CCACHE_NOHASHDIR=1 CCACHE_BASEDIR=$PWD
  export CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
  if [[ $cuda == no ]]; then
    build release OFF
    return
  fi
  # One CUDA build serves `device: cpu` as well, so it is the only one where it can be loaded.
  build cuda-release ON
  if ! can_be_loaded "$built/lighter"; then
    note "compiled and linked for CUDA; without a GPU its 2 GB of libraries are not fetched, so the CPU's build runs"
    build release OFF
  fi
}

main() {
  local total_start
  total_start=$(now)
  parse_command_line "$@"
  cd "$(dirname "${BASH_SOURCE[0]}")"
  [[ $(uname -sm) == 'Linux x86_64' ]] || die "this needs Linux on x86_64, here is $(uname -sm)"
  mkdir -p .deps
  exec 9>.deps/.lock
  flock -n 9 || { echo "another bootstrap.sh runs in this checkout; waiting for it"; flock 9; }
  rm -rf .deps/scratch.* # of a run that was killed; the lock is ours
  scratch=$(mktemp -d "$PWD/.deps/scratch.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  trap 'exit 1' HUP INT TERM

  begin "looking around"
  gpu=no cuda_asked=$cuda
  if has_gpu; then gpu=yes; fi
  case $cuda in cuda) cuda=yes ;; cpu) cuda=no ;; auto) cuda=$gpu ;; esac
  note "$(if [[ $gpu == yes ]]; then echo "a GPU"; else echo "no GPU"; fi);" \
    "building for $(if [[ $cuda == yes ]]; then echo "CUDA and CPU"; else echo "CPU"; fi)"
  [[ -z $libtorch ]] || check_given_libtorch
  plan
  finish

  install_system_packages
  [[ $command != test ]] || install_test_packages
  fetch_missing
  build_all
  case $command in
    demo)
      begin demo
      "$built/lighter" run configs/demo.yaml --prompt "My dear Miss Bennet," || die "the demo failed (exit code $?)"
      finish ;;
    test)
      begin tests
      ctest --test-dir "$built" --output-on-failure || die "tests failed"
      finish ;;
  esac
  printf '==> done: %s\n' "$(since "$total_start")"
}

main "$@"
