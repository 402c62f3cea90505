#!/usr/bin/env bash
# Runs the image as it is meant to run and uses it as engines do: about half a minute, plus the build
# where there is no image yet.
#
#   docker/test_container.sh [IMAGE] [OPTION...]      options are those of `docker run`
#
# CONTAINER_TOOL=podman chooses the tool, PYTHON an interpreter that has kvcodec[sidecar].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool=${CONTAINER_TOOL:-$(command -v docker || command -v podman || true)}
[ -n "$tool" ] || { echo "please install docker or podman, then run this again" >&2; exit 1; }
image=${1:-kvcodec}
"$tool" image inspect "$image" >/dev/null 2>&1 || docker/build.sh "$image"

# Podman leaves the timer of a HEALTHCHECK to systemd.
options=()
[ "${tool##*/}" != podman ] || [ -d /run/systemd/system ] || options+=(--no-health-timer)
exec "${PYTHON:-.venv/bin/python}" docker/container_test.py \
    --tool "$tool" --image "$image" "${options[@]}" -- "${@:2}"
