#!/usr/bin/env bash
# Redis from the distribution: a store of its own, and the metadata engine of JuiceFS.
set -euo pipefail
command -v redis-server >/dev/null || ../apt_install.sh redis-server
