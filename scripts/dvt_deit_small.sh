#!/usr/bin/env bash
# DVT on ImageNet, DeiT-S: bash scripts/dvt_deit_small.sh IMAGENET OUTPUT [GPUS] [further flags of main_deit.py]
#
# No recipe was published for this model: this one is ours, DeiT's 300 epochs of 1024 images per update, for all three
# exits at once. With --finetune deit_small_patch16_224.pth all three start from DeiT-S.
# Not run here on ImageNet; time not measured.
set -euo pipefail
data=${1:?folder with train/ and val/} output=${2:?output folder} gpus=${3:-8}
torchrun --standalone --nproc_per_node="$gpus" main_deit.py --model dvt_deit_small --batch-size $((1024 / gpus)) \
    --data-path "$data" --dist-eval --output_dir "$output" "${@:4}"
