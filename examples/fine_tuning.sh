#!/usr/bin/env bash
# Fine-tune a pretrained network, taught by a larger one: images/train/CLASS/NAME.jpg and images/val (docs/guides.md).
set -euo pipefail
tokenlabel train --recipe small_data --model.name convnextv2_tiny.fcmae_ft_in22k_in1k --loss.beta 0 --data.train images/train --data.val images/val --out runs/teacher
tokenlabel annotate images/train labels --teacher runs/teacher --size 448
tokenlabel train --recipe small_data --model.name vit_small_patch16_224.augreg_in21k_ft_in1k --data.train images/train --data.val images/val --data.labels labels --out runs/student
tokenlabel eval runs/student
tokenlabel export runs/student exported
