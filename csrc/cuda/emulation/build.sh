#!/usr/bin/env bash
# Compiles the CUDA engine for the CPU as the Python module _cuda_emulated: build.sh FOLDER. See cuda_runtime.h.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1
python=${PYTHON:-python3}
read -r -a includes <<<"$("$python" -m pybind11 --includes)"
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
flags=(-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-unused-function)
flags+=(-DPCK_EMULATED -DPCK_MODULE=_cuda_emulated '-DPCK_ARCHITECTURES="sm_90a"' -I"$here" -I"$here/.." "${includes[@]}")
mkdir -p "$folder"
# shellcheck disable=SC2016  # the inner bash expands it
printf '%s\0' "$here"/../*.cu "$here"/../*.cpp "$here"/*.cpp "$here"/../../host/{analysis,check}.cpp |
  xargs -0 -P "${JOBS:-2}" -I{} bash -c 'source=$1; shift; "${CXX:-g++}" "$@" -x c++ -c "$source" -o "$0/$(basename "$source").o"' \
    "$folder" {} "${flags[@]}"
"${CXX:-g++}" -shared -o "$folder/_cuda_emulated$suffix" "$folder"/*.o
