#!/usr/bin/env bash
# Installs Debian packages when it may (root and apt-get); otherwise names them in one line and exits 1.
set -euo pipefail
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "please install $* (Debian names), then run this again" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
# The package lists may be absent (a fresh container) or stale: refresh them only when needed.
if ! install "$@" 2>/dev/null; then
    apt-get update -qq >/dev/null
    install "$@"
fi
