#!/usr/bin/env bash
# Makes sure that the compilers and headers are there which pip cannot bring:
#   g++, ninja, libssl-dev   SGLang compiles its page hash at first use and links it with -lcrypto
#   libxxhash-dev            kvcodec's native library takes its checksum from it
#   python3-dev              headers for that page hash, where the interpreter is the distribution's own
# Installs what is missing when it may (root and apt-get); otherwise names it in one line and exits 1.
set -euo pipefail

has_header() {
    if command -v g++ >/dev/null; then
        printf '#include <%s>\n' "$1" | g++ -E -x c++ - >/dev/null 2>&1
    else
        compgen -G "/usr/include/$1" >/dev/null || compgen -G "/usr/include/*/$1" >/dev/null
    fi
}

has_python_header() {
    python3 - <<'PYTHON'
import os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(sys.base_prefix == "/usr" and not os.path.exists(header))
PYTHON
}

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v ninja >/dev/null || missing+=(ninja-build)
has_header openssl/evp.h || missing+=(libssl-dev)
has_header xxhash.h || missing+=(libxxhash-dev)
has_python_header || missing+=(python3-dev)

if [ ${#missing[@]} -eq 0 ]; then
    echo "system packages: all present"
    exit 0
fi
echo "system packages: installing ${missing[*]}"
"$(dirname "${BASH_SOURCE[0]}")/apt_install.sh" "${missing[@]}"
echo "system packages: done"
