#!/usr/bin/env bash
# Starts compose.yaml without the engine and tries it: two minutes, plus building what is missing.
#
#   docker/test_compose.sh                        with the images of Docker Hub
#   docker/debian_docker.sh build/docker docker/test_compose.sh        where there is none of that
#
# What cannot be pulled is made of Debian's packages (compose/stand-ins.Dockerfile), `docker compose`
# itself too; Grafana is then left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has() { docker image inspect "$1" >/dev/null 2>&1; }
images=$(sed -n 's|^ *image: \(docker.io/.*\)|\1|p' docker/compose.yaml)
compose="docker compose" services=(sidecar store prometheus) options=()

network=()
docker network inspect bridge >/dev/null 2>&1 || network=(--network=host)
has kvcodec || docker/build.sh kvcodec "${network[@]}"
if xargs -n 1 docker pull --quiet <<<"$images" >/dev/null 2>&1; then
    services+=(grafana)
else
    echo "no Docker Hub: Debian's Redis and Prometheus instead, and no Grafana"
    for target in packages redis prometheus; do
        docker build --quiet "${network[@]}" --file docker/compose/stand-ins.Dockerfile \
            --target "$target" --tag "kvcodec-stand-in-$target" docker/compose >/dev/null
    done
    options+=(--file docker/compose/stand-ins.yaml)
fi
if ! $compose version >/dev/null 2>&1; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    compose=$work/docker-compose
    container=$(docker create kvcodec-stand-in-packages true)
    docker cp "$container:/usr/libexec/docker/cli-plugins/docker-compose" "$compose" >/dev/null
    docker rm "$container" >/dev/null
fi
python3 docker/compose_test.py --compose "$compose" "${options[@]}" "${services[@]}"
