#!/usr/bin/env bash
# Mooncake's store: its master, and the client that SGLang imports, in a folder of their own. The wheel
# without CUDA needs no driver; what it depends on comes with SGLang.
set -euo pipefail
version=0.3.13.post1
destination=$1
python=$2

[ "$(cat "$destination/version" 2>/dev/null)" = "$version" ] && exit 0
rm -rf "$destination"
"$python" -m pip install -qq --no-deps --target "$destination" \
    "mooncake-transfer-engine-non-cuda==$version"
PYTHONPATH=$destination "$python" -c 'import mooncake.store'
echo "$version" >"$destination/version"
