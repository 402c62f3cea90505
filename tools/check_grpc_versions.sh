#!/usr/bin/env bash
# Runs the tests of messages, sidecar and client with other releases of grpcio and protobuf. Not part of
# the tests: it downloads some 15 MB and takes about three minutes a pair.
#   usage: tools/check_grpc_versions.sh PYTHON [GRPCIO:PROTOBUF ...]
# PYTHON must have kvcodec[dev]; it is not changed: releases are unpacked below
# ${XDG_CACHE_HOME:-~/.cache}/kvcodec/grpc and laid in front of its own. Without pairs, the oldest that
# the generated code allows and the newest that were tried. PYTEST_ARGS goes to pytest.
set -euo pipefail

if [ $# -lt 1 ] || ! "$1" -c 'import grpc, pytest, kvcodec_server' 2>/dev/null; then
    echo "usage: $0 PYTHON [GRPCIO:PROTOBUF ...]   (a python that has kvcodec[dev])" >&2
    exit 2
fi
python=$(realpath --no-symlinks "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvcodec/grpc
read -ra options <<<"${PYTEST_ARGS:-}"

[ $# -gt 0 ] || set -- 1.78.0:6.31.1 1.85.1:7.36.2
failed=0
for pair; do
    grpcio=${pair%:*} protobuf=${pair#*:}
    release=$cache/$grpcio-$protobuf
    if [ ! -e "$release/.complete" ]; then
        rm -rf "$release"
        "$python" -m pip install -qq --disable-pip-version-check --no-warn-conflicts \
            --root-user-action=ignore --target "$release" "protobuf==$protobuf" \
            grpcio{,-health-checking,-reflection}=="$grpcio" googleapis-common-protos
        touch "$release/.complete"
    fi
    echo "grpcio $grpcio, protobuf $protobuf"
    found=$(PYTHONPATH=$release "$python" -c '
import google.protobuf, grpc
print(grpc.__version__, google.protobuf.__version__)')
    [ "$found" = "$grpcio $protobuf" ] || { echo "but $found was imported" >&2; exit 1; }
    PYTHONPATH=$release "$python" -m pytest -q -p no:cacheprovider tests/test_proto.py \
        tests/test_server_*.py tests/test_sidecar_*.py tests/test_http2_*.py tests/test_remote_door.py \
        "${options[@]}" || failed=1
done
exit $failed
