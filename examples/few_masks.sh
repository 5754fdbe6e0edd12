#!/usr/bin/env bash
# A few images have masks: images/NAME.jpg, masks/NAME.png of some, and their names, one a line (docs/guides.md).
set -euo pipefail
tokenlabel fit-head images head.safetensors --backbone vit_small_patch16_dinov3.lvd1689m --from masks:masks --class-names names.txt
tokenlabel annotate images labels --teacher head.safetensors
tokenlabel inspect labels --images images --masks masks --pictures maps.html
tokenlabel train --recipe pretrain --data.train images --data.labels labels --out runs/dense
tokenlabel annotate images again --teacher runs/dense
