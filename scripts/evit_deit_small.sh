#!/usr/bin/env bash
# EViT on ImageNet from scratch, DeiT-S, the published recipe: bash scripts/evit_deit_small.sh IMAGENET OUTPUT [RATE] [GPUS]
#
# 300 epochs, 2048 images per update, fused token; the keep rate falls from 1 at epoch 10 to RATE at epoch 110.
# Published top-1 at keep rate 0.7: 79.5 %. Not reproduced here; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} output=${2:?output folder} rate=${3:-0.7} gpus=${4:-8}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py --model evit_deit_small --base_keep_rate "$rate" --fuse_token \
    --shrink_start_epoch 10 --shrink_epochs 100 --batch-size $((2048 / gpus)) --warmup-epochs 5 --epochs 300 \
    --data-path "$data" --dist-eval --output_dir "$output"
