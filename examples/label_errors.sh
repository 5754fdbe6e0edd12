#!/usr/bin/env bash
# Which class labels are wrong? images/CLASS/NAME.jpg (docs/guides.md).
set -euo pipefail
tokenlabel fit-head images head.safetensors --backbone convnextv2_nano.fcmae --from labels
tokenlabel annotate images labels --teacher head.safetensors
tokenlabel inspect labels --images images --pictures by-maps.html
tokenlabel inspect labels --images images --out-of-fold convnextv2_nano.fcmae --probabilities probabilities.npz
