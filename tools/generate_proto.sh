#!/bin/sh
# Generates proto/kvcodec_proto/v1/*_pb2* from the .proto files beside them.
#
#   tools/generate_proto.sh [PYTHON]
#
# The generator is pinned: what it writes refuses an older protobuf or grpcio than its own, and
# LMCache's environment has protobuf 6.31 and grpcio 1.78. It lives in a virtual environment of its
# own, because the runtime may be newer.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
environment=build/proto-env
if ! "$environment/bin/python" -c 'import grpc_tools' 2>/dev/null; then
  "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet \
    'grpcio-tools==1.78.0' 'grpcio==1.78.0' 'protobuf==6.31.1' 'setuptools<81'
fi
"$environment/bin/python" -m grpc_tools.protoc --proto_path=proto \
  --python_out=proto --pyi_out=proto --grpc_python_out=proto \
  proto/kvcodec_proto/v1/pages.proto proto/kvcodec_proto/v1/service.proto
