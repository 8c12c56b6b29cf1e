#!/usr/bin/env bash
# LF-ViT on ImageNet, the published recipe: bash scripts/lf_deit_small.sh IMAGENET OUTPUT [7|9] [GPUS]
#
# 300 epochs, 1024 images per update; selection starts at epoch 231.
# Published top-1: 7x7 80.8 % (m=5, threshold 0.76), 9x9 82.2 % (m=8, threshold 0.75). Not reproduced here; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} output=${2:?output folder} size=${3:-7} gpus=${4:-4}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py --model lf_deit_small \
    --location-stage-size "$size" --batch-size $((1024 / gpus)) --data-path "$data" --dist-eval --output_dir "$output"
