#!/usr/bin/env bash
# What a GPU does with all this, in under ten minutes, on a machine from which nothing can be downloaded:
#
#   benchmarks/gpu.sh WHEELS OUT            packages from the folder WHEELS (made by `pip download`), results into OUT
#   benchmarks/gpu.sh - OUT --device cpu --tiny     with what is installed; runs everything in small
#
# WHEELS holds what PyTorch's image lacks: pip download -d WHEELS --python-version 3.12 --only-binary :all: --no-deps
#   timm jaxtyping wadler-lindig safetensors zstandard tqdm huggingface-hub filelock
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,9p' "$0" >&2; exit 2; }
wheels=$1 out=$2
shift 2
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ "$wheels" != - ]; then wheels=$(cd "$wheels" && pwd); fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ "$wheels" != - ]; then
  "$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl || exit 1
  export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
  timeout 60 "$python" -m pytest -q -m gpu tests 2>&1 | tee "$out/pytest.txt" | tail -3
fi
"$python" -m benchmarks.gpu --out "$out/gpu.jsonl" "$@" 2>&1 | tee -a "$out/gpu.txt"
exit "${PIPESTATUS[0]}"
