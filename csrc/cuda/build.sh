#!/usr/bin/env bash
# Builds the CUDA engine with nvcc and g++ alone, without CMake: build.sh FOLDER puts _cuda there.
# PYTHON, CXX, NVCC and JOBS say with what; it needs pybind11's headers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1
python=${PYTHON:-python3}
nvcc=${NVCC:-nvcc}
read -r -a includes <<<"$("$python" -m pybind11 --includes)"
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
# shellcheck disable=SC2054  # commas are nvcc's
codes=(-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90)
architectures='-DPCK_ARCHITECTURES="sm_80 sm_90a compute_90"'
mkdir -p "$folder"
# shellcheck disable=SC2016  # the inner bash expands it
printf '%s\0' "$here"/*.cu | xargs -0 -P "${JOBS:-1}" -I{} bash -c \
  'folder=$1 source=$2; shift 2; "$@" -c "$source" -o "$folder/$(basename "$source").o"' _ "$folder" {} \
  "$nvcc" -std=c++17 -O3 "$architectures" -Xcompiler -fPIC,-fvisibility=hidden "${codes[@]}"
for source in "$here"/bindings.cpp "$here"/layout.cpp "$here"/../host/analysis.cpp "$here"/../host/check.cpp; do
  "${CXX:-g++}" -std=c++17 -O2 -fPIC -fvisibility=hidden "$architectures" "${includes[@]}" \
    -c "$source" -o "$folder/$(basename "$source").o"
done
"$nvcc" -shared -cudart static -Xcompiler -fPIC -o "$folder/_cuda$suffix" "$folder"/*.o
