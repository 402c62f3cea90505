#!/usr/bin/env bash
# Tries the SGLang plugin with older releases of SGLang: hooks, command line, construction, and pages of
# that release's own host pools in every layout. Not part of the tests: it downloads some 250 MB, which take 1.5 GB unpacked.
#   usage: tools/check_sglang_versions.sh PYTHON [VERSION ...]
# PYTHON must have kvcodec and what tools/install_sglang.sh installs; it is not changed. Wheels are
# unpacked below ${XDG_CACHE_HOME:-~/.cache}/kvcodec/sglang and stay there.
set -euo pipefail

if [ $# -lt 1 ] || ! "$1" -c 'import sglang, sglang_cpu_bridge, kvcodec' 2>/dev/null; then
    echo "usage: $0 PYTHON [VERSION ...]   (a python that has kvcodec and SGLang)" >&2
    exit 2
fi
python=$1
shift
versions=${*:-0.5.11 0.5.12 0.5.15 0.5.18 0.5.20 0.5.21 0.5.22 0.5.23}
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvcodec/sglang
mkdir -p "$cache"

# install DIRECTORY REQUIREMENT: unpack one wheel, once
install() {
    [ -e "$1/.complete" ] && return
    rm -rf "$1"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install -qq --no-deps --no-warn-conflicts \
        --root-user-action=ignore --target "$1" "$2"
    touch "$1/.complete"
}
# pinned DISTRIBUTION DIRECTORY: the version of a requirement that the release itself asks for
pinned() {
    sed -n "s/^Requires-Dist: $1==\([0-9.]*\).*/\1/p" "$2"/sglang-*.dist-info/METADATA | head -1
}

failed=0
for version in $versions; do
    release=$cache/sglang-$version
    install "$release" "sglang==$version"
    path=$release
    for name in transformers tokenizers; do
        wanted=$(pinned "$name" "$release")
        # Releases before 0.5.20 leave tokenizers to transformers 5, which wants this one.
        [ "$name" = tokenizers ] && wanted=${wanted:-0.22.2}
        install "$cache/$name-$wanted" "$name==$wanted"
        path=$path:$cache/$name-$wanted
    done
    # Our plugin alone: what the CPU bridge hooks differs between releases.
    PYTHONPATH=$path SGLANG_PLUGINS=kvcodec timeout 600 \
        "$python" -W ignore "$here/check_sglang_release.py" "$version" || failed=1
done
exit $failed
