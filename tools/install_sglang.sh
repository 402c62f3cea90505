#!/usr/bin/env bash
# Installs a CPU-only SGLang 0.5.23, as the tests and the demo need it, into the virtual environment of PYTHON.
#   usage: tools/install_sglang.sh PYTHON
# No CUDA package is installed. A second run returns at once: a stamp records the digest of every input.
set -euo pipefail

if [ $# -ne 1 ] || ! [ -x "$1" ]; then
    echo "usage: $0 PYTHON   (an executable python of a virtual environment)" >&2
    exit 2
fi
python=$1
here=$(cd "$(dirname "$0")" && pwd)
bridge=$here/sglang_cpu
torch_requirement='torch==2.13.0+cpu'

inputs_digest() {
    (cd "$here" && find install_sglang.sh sglang_cpu -type f \
        \( -name '*.sh' -o -name '*.txt' -o -name '*.toml' -o -name '*.py' \) -print0 \
        | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
}

step() { echo "sglang: $*"; }
pip_install() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install -qq --no-warn-conflicts \
        --root-user-action=ignore "$@"
}
is_installed() {
    "$python" - "$@" <<'PYTHON' >/dev/null 2>&1
import sys
from importlib.metadata import version
for requirement in sys.argv[1:]:
    name, _, wanted = requirement.partition("==")
    assert version(name) == wanted, requirement
PYTHON
}

prefix=$("$python" -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")')
if [ -z "$prefix" ]; then
    echo "sglang: $python is not in a virtual environment; refusing to change it" >&2
    exit 2
fi
stamp=$prefix/.sglang_cpu_installed
digest=$(inputs_digest)
if [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ] \
    && is_installed "$torch_requirement" sglang==0.5.23 sglang-cpu-bridge==0.1.0; then
    step "already installed"
    exit 0
fi
rm -f "$stamp"

if ! is_installed "$torch_requirement"; then
    step "1/5 $torch_requirement (about 20 s)"
    # The +cpu label keeps the CUDA build away, which is what a bare version means on some platforms.
    if ! pip_install "$torch_requirement"; then
        echo "sglang: pip finds no $torch_requirement; add PyTorch's index of CPU wheels to pip's" \
            "configuration (PIP_EXTRA_INDEX_URL) and run this again" >&2
        exit 1
    fi
else
    step "1/5 $torch_requirement is there"
fi
step "2/5 the packages that the server imports (about 40 s)"
pip_install -r "$bridge/requirements.txt"
step "3/5 sglang 0.5.23, transformers and triton, without their CUDA dependencies"
pip_install --no-deps -r "$bridge/requirements-no-deps.txt"

step "4/5 sglang-cpu-bridge"
# Built from a copy: setuptools leaves build directories beside the sources.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -R "$bridge" "$scratch/bridge"
pip_install --no-deps --no-build-isolation --force-reinstall "$scratch/bridge"

step "5/5 compiling SGLang's page hash, and checking that SGLang imports"
timeout 300 "$python" -W ignore -m sglang_cpu_bridge.check

if "$python" -m pip list --format=freeze 2>/dev/null | grep -i -E '^(nvidia-|cuda-|sgl-kernel|sglang-kernel)'; then
    echo "sglang: the CUDA packages above arrived, which must not happen" >&2
    exit 1
fi
echo "$digest" > "$stamp"
step "done"
