#!/usr/bin/env bash
# A-ViT on ImageNet, DeiT-S, the published recipe: bash scripts/avit_deit_small.sh IMAGENET OUTPUT DEIT_SMALL.pth [GPUS]
#
# 100 epochs from DeiT's weights (deit_small_patch16_224-cd65a155.pth), 384 images per update, gate 10 and 75.
# Published top-1: 78.8 % at 3.6 GFLOPs (released weights). Not reproduced here; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} output=${2:?output folder} weights=${3:?weights of DeiT-S} gpus=${4:-4}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py --model avit_deit_small --finetune "$weights" \
    --batch-size $((384 / gpus)) --data-path "$data" --dist-eval --output_dir "$output"
