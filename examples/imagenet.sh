#!/usr/bin/env bash
# LV-ViT-S as published, with the label files of 2021: imagenet/train/n01440764/NAME.JPEG, imagenet/val (docs/guides.md).
set -euo pipefail
tokenlabel import-labels label_top5_train_nfnet labels --images imagenet/train --num-classes 1000
torchrun --nproc-per-node 8 -m tokenlabel train --recipe lvvit_s --data.train imagenet/train --data.val imagenet/val --data.labels labels --loss.map-mode published --augment.order before_crop --out runs/lvvit_s
tokenlabel eval runs/lvvit_s
