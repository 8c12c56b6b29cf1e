#!/usr/bin/env bash
# A-ViT on ImageNet, DeiT-Ti, the published recipe: bash scripts/avit_deit_tiny.sh IMAGENET OUTPUT DEIT_TINY.pth [GPUS]
#
# 100 epochs from DeiT's weights (deit_tiny_patch16_224-a1311bcf.pth), 512 images per update, gate 10 and 30.
# Published top-1: 71.4 % at 0.8 GFLOPs (released weights). Not reproduced here; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} output=${2:?output folder} weights=${3:?weights of DeiT-Ti} gpus=${4:-4}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py --model avit_deit_tiny --finetune "$weights" \
    --batch-size $((512 / gpus)) --data-path "$data" --dist-eval --output_dir "$output"
