#!/usr/bin/env bash
# Runs a command with a Docker daemon of its own, where neither Docker nor Docker Hub is to be had:
#
#   docker/debian_docker.sh build/docker \
#     sh -c 'docker/build.sh kvcodec --network=host && docker/test_container.sh kvcodec'
#
# Root, on Debian or Ubuntu. The daemon is unpacked from the distribution's packages into the folder,
# not installed; it has no bridge and changes no firewall, and ends with the command. Instead of the
# base image it has one with Debian's own Python and this machine's certificates. The first time takes
# two minutes and 700 MB; the images stay in the folder.
set -euo pipefail

packages=(docker.io containerd runc debootstrap)
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
folder=$(realpath --no-symlinks "${1:?usage: debian_docker.sh FOLDER COMMAND...}")
shift
base=$(sed -n 's/^ARG PYTHON_IMAGE=//p' "$here/Dockerfile")
release=${base##*-}

mkdir -p "$folder"
if [ ! -x "$folder/unpacked/usr/sbin/debootstrap" ]; then
    mkdir -p "$folder/debs"
    (
        cd "$folder/debs"
        apt-get download -qq "${packages[@]}" 2>/dev/null || {
            apt-get update -qq
            apt-get download -qq "${packages[@]}"
        }
        for deb in *.deb; do dpkg -x "$deb" "$folder/unpacked"; done
    )
    rm -r "$folder/debs"
fi
export PATH="$folder/unpacked/usr/bin:$folder/unpacked/usr/sbin:$PATH"
export DOCKER_HOST="unix://$folder/docker.sock"

# A chroot of this release has the Python that the image of this release is made from.
if [ ! -f "$folder/base.tar" ]; then
    export DEBOOTSTRAP_DIR="$folder/unpacked/usr/share/debootstrap"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        "$release" "$folder/chroot" >"$folder/debootstrap.log"
    rm -rf "$folder"/chroot/var/{cache/apt/archives/*.deb,lib/apt/lists/*} \
        "$folder"/chroot/usr/share/{doc,man,locale}/*
    cp /etc/ssl/certs/ca-certificates.crt "$folder/chroot/etc/ssl/certs/"
    tar -C "$folder/chroot" -cf "$folder/base.tar.part" .
    mv "$folder/base.tar.part" "$folder/base.tar"
    rm -rf "$folder/chroot"
fi

# Docker's own limit may be more than this machine lets anybody have.
dockerd --data-root "$folder/data" --exec-root "$folder/run" --pidfile "$folder/docker.pid" \
    --host "$DOCKER_HOST" --bridge none --iptables=false --ip6tables=false \
    --default-ulimit "nofile=$(ulimit -Hn)" >"$folder/dockerd.log" 2>&1 &
daemon=$!
end() {
    kill "$daemon"
    wait "$daemon" || true
    # Of --network none; it would keep the folder from being removed.
    umount "$folder"/run/netns/* 2>/dev/null || true
}
trap end EXIT
for _ in $(seq 100); do
    docker version >/dev/null 2>&1 && break
    kill -0 "$daemon" || { tail -n 5 "$folder/dockerd.log" >&2; exit 1; }
    sleep 0.2
done

docker image inspect "$base" >/dev/null 2>&1 || docker import \
    --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
    "$folder/base.tar" "${base#docker.io/library/}"

"$@"
