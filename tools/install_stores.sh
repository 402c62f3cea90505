#!/usr/bin/env bash
# Installs the real stores that the tests run against, each by a script of its own in tools/stores:
#
#   tools/install_stores.sh PYTHON        into PYTHON's environment, below stores/
#
# A store that cannot be installed on this machine is named in one line, and its tests skip; nothing
# else fails for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/stores"

python=$(realpath --no-symlinks "$OLDPWD/${1:?usage: install_stores.sh PYTHON}")
root=$("$python" -c 'import sys; print(sys.prefix)')/stores
log=$(mktemp)
trap 'rm -f "$log"' EXIT

for script in *.sh; do
    name=${script%.sh}
    mkdir -p "$root/$name"
    if ! "./$script" "$root/$name" "$python" >"$log" 2>&1; then
        echo "no $name on this machine: $(tail -n 1 "$log")" >&2
    fi
done
