#!/usr/bin/env bash
# LMCache, in an environment of its own: it pins numpy, fastapi and OpenTelemetry lower than others
# here want them. torch, kvcodec and whatever else fits come from PYTHON's environment.
set -euo pipefail
destination=$1 python=$2
version=0.5.6

stamp=$destination/stamp-$version
if [ -e "$stamp" ]; then
    exit 0
fi
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "LMCache needs torch, which comes with \`make sglang\`; run \`make stores\` after it" >&2
    exit 1
fi
rm -rf "$destination"
"$python" -m venv "$destination"
# A .pth file is read for each start: what is installed beside it comes first, the rest is shared.
"$python" - "$destination" <<'PTH'
import pathlib, sys, sysconfig

shared = sysconfig.get_path("purelib")
own = sysconfig.get_path("purelib", vars={"base": sys.argv[1]})
pathlib.Path(own, "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
PTH
# LMCache asks for CUDA libraries that a machine without a GPU has no use for: --no-deps.
pip=("$destination/bin/python" -m pip install --quiet --no-warn-conflicts)
"${pip[@]}" --no-deps "lmcache==$version"
"${pip[@]}" aiofiles blake3 cachetools cryptography 'fastapi<0.140' 'grpcio==1.78.0' \
    'grpcio-observability==1.78.0' httptools httpx msgspec numba 'numpy<=2.2.6' \
    'opentelemetry-api==1.40.0' 'opentelemetry-exporter-prometheus==0.61b0' \
    'opentelemetry-sdk==1.40.0' 'prometheus_client<=0.24.1' 'protobuf>=6.31.1,<7' psutil \
    py-cpuinfo pyyaml pyzmq requests sortedcontainers uvicorn aiohttp
LMCACHE_TRACK_USAGE=false "$destination/bin/python" -c 'import lmcache.v1.multiprocess.server'
touch "$stamp"
