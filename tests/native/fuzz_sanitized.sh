#!/bin/sh
# Builds libkvcodec with AddressSanitizer and UndefinedBehaviorSanitizer and lets the tests of damaged pages run on it.
#
#   tests/native/fuzz_sanitized.sh [mutants]      20000, unless told otherwise
#
# PYTHON and CXX choose the interpreter and the compiler; the build stays in $BUILD.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mutants=${1:-20000}
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cxx=${CXX:-g++}
build=${BUILD:-$(mktemp -d)}
[ -n "${BUILD:-}" ] || trap 'rm -rf "$build"' EXIT

# The library is found beside the package, so the package is copied to where the instrumented one can lie.
rm -rf "$build/kvcodec" "$build/objects"
mkdir -p "$build/objects"
cp -r "$root/kvcodec" "$build/"
rm -f "$build"/kvcodec/native/libkvcodec.*

flags="-std=c++17 -O1 -g -fPIC -fvisibility=hidden -ffp-contract=off -fno-omit-frame-pointer -pthread"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all"
pids=""
for source in "$root"/kvcodec/native/*.cpp; do
  # shellcheck disable=SC2086 - the flags are words
  "$cxx" $flags -c "$source" -o "$build/objects/$(basename "$source" .cpp).o" &
  pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done
"$cxx" -shared -fsanitize=address,undefined -pthread "$build"/objects/*.o -o "$build/kvcodec/native/libkvcodec.so"

# The interpreter is not instrumented: the runtime has to be there first, and Python's own small-object
# allocator has to leave, or a read beyond a page would hit its neighbour unseen.
cd "$build"
export ASAN_OPTIONS="detect_leaks=0 allocator_may_return_null=1"
export UBSAN_OPTIONS="print_stacktrace=1"
export PYTHONMALLOC=malloc
export PYTHONPATH="$build:$root${PYTHONPATH:+:$PYTHONPATH}"
export KVCODEC_MUTANTS="$mutants"
runtime="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"

# A control: a checksum of one byte too many has to be seen, or everything below proves nothing.
if LD_PRELOAD="$runtime" "$python" - 2>"$build/control" <<'EOF'
import numpy as np
from kvcodec.native._library import library
page = np.frombuffer(bytes(448), np.uint8).copy()
library().checksum(page.ctypes.data, 449)
EOF
then
  echo "the sanitizer does not see a read beyond a page" >&2
  exit 1
fi
grep -q "ERROR: AddressSanitizer" "$build/control" || { cat "$build/control" >&2; exit 1; }

LD_PRELOAD="$runtime" "$python" -m pytest -q -p no:cacheprovider --rootdir "$root" \
  -c "$root/pyproject.toml" -o timeout=0 "$root/tests/test_mutants.py" -k "native or flipped"
