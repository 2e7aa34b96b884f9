#!/usr/bin/env bash
# Measure a GPU on random images in at most ten minutes: benchmarks/gpu.sh [--out FOLDER]
#
# The measurements go into benchmarks/results/machines, in a file with the name of the GPU. Each part is
# written when it ends; one that fails or takes too long is recorded with its error.
#
# The packages of ldae are enough. For a machine without a network that has torch, timm, numpy, safetensors,
# pillow, tqdm and pyyaml, put the others beside this checkout first, on a machine with a network:
#     pip wheel --no-deps --wheel-dir wheels . && pip wheel --wheel-dir wheels tyro
# They are installed into a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if compgen -G 'wheels/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" wheels/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -m benchmarks gpu --device cuda "$@"
