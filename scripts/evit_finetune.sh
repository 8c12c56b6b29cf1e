#!/usr/bin/env bash
# EViT from DeiT-S weights, the published recipe: bash scripts/evit_finetune.sh IMAGENET WEIGHTS OUTPUT [RATE] [SIZE] [GPUS]
#
# 30 epochs, 2048 images per update, patches dropped from the first step; SIZE is the side of the images (224). DeiT
# fine-tunes without stochastic depth, hence --drop-path 0.
# Not run here on ImageNet; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} weights=${2:?DeiT-S weights} output=${3:?output folder}
rate=${4:-0.7} size=${5:-224} gpus=${6:-8}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py --model evit_deit_small --base_keep_rate "$rate" --fuse_token \
    --input-size "$size" --finetune "$weights" --lr 2e-5 --min-lr 2e-6 --weight-decay 1e-6 --warmup-epochs 0 --epochs 30 \
    --shrink_start_epoch 0 --shrink_epochs 0 --drop-path 0 --batch-size $((2048 / gpus)) \
    --data-path "$data" --dist-eval --output_dir "$output"
