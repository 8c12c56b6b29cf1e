#!/usr/bin/env bash
# CF-ViT on ImageNet, LV-ViT-S with token labels: bash scripts/cf_lvvit_small.sh IMAGENET LABELS OUTPUT [7|9] [GPUS]
#
# 310 epochs, 1024 images per update; selection starts at epoch 201. The model's recipe holds the rest (learning rate
# 1.6e-3 as it is, mix token instead of mixup, crop 0.9). LABELS are the published token labels or those of
# scripts/make_token_labels.py.
# Published top-1 of the fine stage: 7x7 83.6 %, 9x9 84.4 %. Not reproduced here; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} labels=${2:?folder of token labels} output=${3:?output folder}
size=${4:-7} gpus=${5:-4}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py "$data" --model cf_lvvit_small -b $((1024 / gpus)) \
    --coarse-stage-size "$size" --token-label --token-label-data "$labels" --model-ema --eval-metric top1_f --amp \
    --output_dir "$output"
