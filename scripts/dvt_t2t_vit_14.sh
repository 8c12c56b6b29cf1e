#!/usr/bin/env bash
# DVT on ImageNet, T2T-ViT-14, the published recipe: bash scripts/dvt_t2t_vit_14.sh IMAGENET OUTPUT [GPUS]
#
# 310 epochs, 512 images per update, learning rate 5e-4 as it is, weight decay 0.05; the model's recipe holds these.
# All three exits are trained from the first step. Class tokens are not decayed, which the published run did.
# No figure is quoted and none reproduced here; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} output=${2:?output folder} gpus=${3:-8}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py --model dvt_t2t_vit_14 --batch-size $((512 / gpus)) \
    --data-path "$data" --dist-eval --amp --output_dir "$output"
