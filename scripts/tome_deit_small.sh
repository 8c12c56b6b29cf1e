#!/usr/bin/env bash
# ToMe on DeiT-S without training: bash scripts/tome_deit_small.sh IMAGENET OUTPUT deit_small_patch16_224.pth
#
# Takes DeiT's weights as they are and evaluates them with 0 to 16 tokens merged in every block.
# Published top-1: 79.8 % at r = 0, 79.4 % at r = 13 (4.61 and 2.71 GFLOPs, counted here). Not reproduced here; time not
# measured.
set -euo pipefail
data=${1:?folder with val/} output=${2:?output folder} weights=${3:?file of DeiT-S}
checkpoint=$output/tome_deit_small.pth
[ -e "$checkpoint" ] || python scripts/convert_checkpoint.py "$weights" "$checkpoint" --model tome_deit_small
python dynamic_inference.py --vary r 0 4 8 13 16 --data_url "$data" --checkpoint_path "$checkpoint" \
    --results "$output/tome_deit_small.json"
