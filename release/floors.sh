#!/usr/bin/env bash
# Run the tests on the oldest torch, torchvision and timm that pyproject.toml names, in a fresh environment.
# Fetches PyTorch (gigabytes). Usage: release/floors.sh [PYTHON]
set -euo pipefail
python=${1:-python3} checkout=$(cd "$(dirname "$0")/.." && pwd) scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=
"$python" -m venv "$scratch/env"
sed -nE 's/^  "(torch|torchvision|timm)>=([0-9.]+)",.*/\1==\2/p' "$checkout/pyproject.toml" >"$scratch/floors.txt"
cat "$scratch/floors.txt"
"$scratch/env/bin/pip" install --quiet "$checkout[dev]" --constraint "$scratch/floors.txt"
cd "$checkout"
"$scratch/env/bin/python" -m pytest -p no:cacheprovider -m 'not long and not gpu'
