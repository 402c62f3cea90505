#!/bin/sh
# Builds libkvcodec and its driver with AddressSanitizer and UndefinedBehaviorSanitizer, then with ThreadSanitizer,
# and runs every mode briefly. CXX chooses the compiler; the builds stay in $BUILD.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
native="$here/../../kvcodec/native"
cxx=${CXX:-c++}
build=${BUILD:-$(mktemp -d)}
mkdir -p "$build"
[ -n "${BUILD:-}" ] || trap 'rm -rf "$build"' EXIT

for sanitizer in address,undefined thread; do
  driver="$build/driver-${sanitizer%,*}"
  pids=""
  mkdir -p "$driver.objects"
  for source in "$native"/*.cpp "$here/driver.cpp" "$here/case.cpp"; do
    instrument="-fsanitize=$sanitizer -fno-sanitize-recover=all"
    # Kernels share nothing between threads, and are most of the code.
    case "$sanitizer $source" in thread*/avx*) instrument="" ;; esac
    "$cxx" -std=c++17 -O1 -g -Wall -Wextra -Werror -ffp-contract=off -fno-omit-frame-pointer \
      $instrument -pthread -I"$native" \
      -c "$source" -o "$driver.objects/$(basename "$source").o" &
    pids="$pids $!"
  done
  for pid in $pids; do wait "$pid"; done
  "$cxx" -fsanitize="$sanitizer" -pthread "$driver.objects"/*.o -o "$driver"
done

export ASAN_OPTIONS=detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=second_deadlock_stack=1
"$build/driver-address" all
"$build/driver-thread" threads 8
"$build/driver-thread" compare 30
