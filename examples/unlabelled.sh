#!/usr/bin/env bash
# No image has a class label, or few do: images/NAME.jpg, and few_labelled/train/CLASS/NAME.jpg (docs/guides.md).
set -euo pipefail
tokenlabel fit-head images words.safetensors --backbone vit_small_patch16_dinov3.lvd1689m --from words
tokenlabel annotate images labels --teacher words.safetensors
tokenlabel train --recipe pretrain --data.train images --data.labels labels --out runs/pretrained
tokenlabel train --recipe finetune --model.weights runs/pretrained --data.train few_labelled/train --data.val few_labelled/val --out runs/few
tokenlabel eval runs/few
