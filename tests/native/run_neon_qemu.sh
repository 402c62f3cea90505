#!/bin/sh
# Builds libkvcodec's driver for AArch64 and runs it under qemu: NEON must give the bytes of the scalar kernels.
# Exit status 77 with a reason if a tool is missing. Arguments go to the driver.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
native="$here/../../kvcodec/native"
cxx=${AARCH64_CXX:-aarch64-linux-gnu-g++}
qemu=${QEMU:-qemu-aarch64}
for tool in "$cxx" "$qemu"; do
  if ! command -v "$tool" >/dev/null; then
    echo "skipped: no $tool (Debian: g++-aarch64-linux-gnu, qemu-user)"
    exit 77
  fi
done
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# Only the header of xxhash is used; it knows no architecture, so the system's own will do.
header=$(echo '#include <xxhash.h>' | c++ -x c++ -M - 2>/dev/null | tr ' ' '\n' | grep 'xxhash\.h$' | head -n 1)
if [ -z "$header" ]; then
  echo "skipped: no xxhash.h (Debian: libxxhash-dev)"
  exit 77
fi
mkdir "$build/include"
cp "$header" "$build/include"
[ ! -f "$(dirname "$header")/xxh3.h" ] || cp "$(dirname "$header")/xxh3.h" "$build/include"

"$cxx" -std=c++17 -O2 -Wall -Wextra -Werror -ffp-contract=off -static -pthread \
  -I"$native" -isystem "$build/include" \
  "$native"/*.cpp "$here"/driver.cpp "$here"/case.cpp "$here"/coded.cpp -o "$build/driver"
[ $# -gt 0 ] || set -- all
"$qemu" "$build/driver" "$@"
