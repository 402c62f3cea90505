#!/usr/bin/env bash
# buf, which checks the messages of the sidecar. Its makers publish the same program on PyPI and npm;
# PyPI's needs no Node.
set -euo pipefail
folder=$1 python=$2
version=1.75.0

program="$folder/bin/buf"
[ "$("$program" --version 2>/dev/null)" != "$version" ] || exit 0
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade \
    --no-deps --only-binary :all: --target "$folder" "buf-bin==$version"
"$program" --version
