#!/usr/bin/env bash
# Build the wheel, install it into a fresh environment without extras, and use it in an empty folder, as a stranger would.
# Fetches PyTorch (gigabytes); everything lies in a temporary folder, which goes at the end. Usage: release/wheel.sh [PYTHON]
set -euo pipefail
python=${1:-python3} checkout=$(cd "$(dirname "$0")/.." && pwd) scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH= OMP_NUM_THREADS=1

say() { printf '\n== %s\n' "$*"; }

say "build, and install without extras"
"$python" -m venv "$scratch/env"
source "$scratch/env/bin/activate"
pip wheel --quiet --no-deps --wheel-dir "$scratch/dist" "$checkout"
pip install --quiet "$scratch"/dist/*.whl
mkdir "$scratch/empty" && cd "$scratch/empty"
tokenlabel --version
tokenlabel --help
du -sh "$scratch/env" "$scratch"/dist/*.whl

say "the main path without an extra: from a folder of images to a network, an evaluation and a report"
python "$checkout/release/squares.py" images
small=(--model.name test_vit --model.img_size 64 --model.options.pretrained false --epochs 2 --batch-size 16
    --micro-batch-size 16 --optim.warmup-epochs 0 --data.num-workers 0)
data=(--data.train images/train --data.val images/val)
tokenlabel train --recipe small_data --out runs/teacher "${data[@]}" "${small[@]}" --loss.beta 0
tokenlabel annotate images/train labels --teacher runs/teacher
tokenlabel inspect labels --images images/train --pictures labels.html
tokenlabel train --recipe small_data --out runs/first "${data[@]}" "${small[@]}" --data.labels labels
tokenlabel eval runs/first
tokenlabel export runs/first exported
tokenlabel report runs/first --output report.html

say "the README's Python"
sed -n '/^## In Python/,/^## One/s/^    //p' "$checkout/README.md" >readme.py
[ -s readme.py ]
python readme.py

say "the demo without its extra says in one line what is missing"
if tokenlabel demo --fast; then exit 1; fi

say "the demo with its extra"
pip install --quiet "$(echo "$scratch"/dist/*.whl)[demo]"
tokenlabel demo --fast
