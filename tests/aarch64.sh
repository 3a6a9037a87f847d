#!/usr/bin/env bash
# Cross-compiles the extension for 64-bit ARM and runs the kernels' tests in an emulator, on NEON and on NEON with dot
# products of bfloat16 and bytes.
#
#     tests/aarch64.sh [PYTEST ARGUMENTS]      default: edge cases, groups, and all sets beside each other
#
# Needs Debian 12 or another system with Python 3.11 as its own, and
#     apt-get install qemu-user g++-aarch64-linux-gnu
#     dpkg --add-architecture arm64 && apt-get update
# Downloads Python for ARM and torch's last build for it without CUDA (600 MB unpacked) into build/aarch64, once.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/aarch64/root site=$PWD/build/aarch64/site package=$PWD/build/aarch64/package
pip=${PIP:-.venv/bin/pip}
include=$("$(dirname "$pip")/python" -c 'import pybind11; print(pybind11.get_include())')

if [ ! -e build/aarch64/.there ]; then
  rm -rf build/aarch64
  mkdir -p build/aarch64/debs "$root"
  libraries=(libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libgomp1)
  libraries+=(libncursesw6 libtinfo6 libreadline8 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal libpython3.11-dev)
  (cd build/aarch64/debs && apt-get download -q "${libraries[@]/%/:arm64}")
  for deb in build/aarch64/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
  "$pip" install --quiet --disable-pip-version-check --target "$site" --no-deps --only-binary :all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --platform any \
    torch==2.10.0 numpy typing_extensions sympy networkx jinja2 filelock fsspec mpmath markupsafe pytest pluggy iniconfig \
    packaging setuptools pygments
  touch build/aarch64/.there
fi

rm -rf "$package"
mkdir -p "$package/objects"
cp -r t2kernels tests pyproject.toml "$package"
rm -f "$package"/t2kernels/_C*
flags=(-O3 -std=c++20 -ffp-contract=off -fvisibility=hidden -fPIC -DTORCH_TARGET_VERSION=0x020a000000000000)
flags+=(-DTORCH_EXTENSION_NAME=_C -Icsrc "-I$include" "-I$root/usr/include/python3.11" "-I$root/usr/include" "-I$site/torch/include")
for file in csrc/binding.cpp csrc/cpu/*.cpp; do
  aarch64-linux-gnu-g++ "${flags[@]}" -c "$file" -o "$package/objects/$(basename "$file" .cpp).o"
done
aarch64-linux-gnu-g++ -shared -o "$package/t2kernels/_C.cpython-311-aarch64-linux-gnu.so" "$package"/objects/*.o \
  "-L$site/torch/lib" -lc10 -ltorch_cpu

[ $# -gt 0 ] || set -- tests/t2kernels/{test_degenerate,test_kept_group,test_bit_equality}.py
cd "$package"
exec qemu-aarch64 -cpu max -L "$root" -E "LD_LIBRARY_PATH=$site/torch/lib" -E "PYTHONPATH=$package:$site" -E OMP_NUM_THREADS=1 \
  "$root/usr/bin/python3.11" -m pytest --quiet -p no:cacheprovider "$@"
