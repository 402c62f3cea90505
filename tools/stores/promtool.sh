#!/usr/bin/env bash
# promtool, which checks metrics and alert rules: one file of Debian's prometheus, no service.
set -euo pipefail
target=$(realpath "$1")/promtool
if [ -x "$target" ]; then
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq >/dev/null; apt-get download -qq prometheus; }
dpkg-deb --fsys-tarfile ./prometheus_*.deb | tar x ./usr/bin/promtool
mv usr/bin/promtool "$target"
