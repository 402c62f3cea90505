#!/usr/bin/env bash
# Builds the image of the sidecar with whatever is here, docker or podman, and says how large it is.
#
#   docker/build.sh [TAG] [OPTION...]      options are those of `docker build`
#
# CONTAINER_TOOL=podman chooses one; by hand it is `docker build -f docker/Dockerfile -t kvcodec .`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool=${CONTAINER_TOOL:-$(command -v docker || command -v podman || true)}
[ -n "$tool" ] || { echo "please install docker or podman, then run this again" >&2; exit 1; }
tag=${1:-kvcodec}
options=("${@:2}")
# Without it podman drops the HEALTHCHECK, which OCI's own format does not know.
case ${tool##*/} in podman) options+=(--format docker) ;; esac

"$tool" build -f docker/Dockerfile -t "$tag" "${options[@]}" .
bytes=$("$tool" image inspect --format '{{.Size}}' "$tag")
echo "$tag: $((bytes / 1000000)) MB"
