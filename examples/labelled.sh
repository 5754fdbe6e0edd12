#!/usr/bin/env bash
# All my images have class labels: images/train/CLASS/NAME.jpg and images/val/CLASS/NAME.jpg (docs/guides.md).
set -euo pipefail
tokenlabel fit-head images/train head.safetensors --backbone convnextv2_nano.fcmae --from labels
tokenlabel annotate images/train labels --teacher head.safetensors
tokenlabel train --recipe small_data --data.train images/train --data.val images/val --data.labels labels --out runs/first
tokenlabel eval runs/first
tokenlabel report runs/first --output report.html
