#!/usr/bin/env bash
# All nano models on the embedded data set, a table and a curve: bash scripts/compare.sh [DATA] [OUTPUT]
#
# 128,000 images seen by each, DVT half of them: with three networks in one it takes longest by far.
# Measured, 2 CPU cores: about two hours; figures in docs/results.md.
set -euo pipefail
data=${1:-data/digits} output=${2:-output/compare}
two_stage="--coarse-only 0.39 --select-from 0"
python scripts/compare.py --data "$data" --output "$output" --systems \
    "plain 14x14:deit_nano" \
    "plain 7x7:deit_nano:--model-kwargs patch_size=8" \
    "plain 7x7, half size:deit_nano:--model-kwargs img_size=28" \
    "EViT 14x14, keep 0.7:evit_deit_nano:--fuse_token" \
    "EViT 7x7, keep 0.7:evit_deit_nano:--fuse_token --model-kwargs patch_size=8" \
    "ToMe 14x14, r = 24:tome_deit_nano" \
    "A-ViT 7x7:avit_deit_nano:--model-kwargs patch_size=8" \
    "DVT, DeiT, half the training:dvt_deit_nano:--epochs 1" \
    "LF-ViT:lf_deit_nano:$two_stage" \
    "LF-ViT, focus keeps 0.7:lf_deit_nano:$two_stage --model-kwargs reducer=evit keep_rate=0.7" \
    "LF-ViT, focus merges 8:lf_deit_nano:$two_stage --model-kwargs reducer=tome r=8" \
    "CF-ViT, DeiT:cf_deit_nano:$two_stage" \
    "CF-ViT, LV-ViT:cf_lvvit_nano:$two_stage" \
    "CF-ViT, LV-ViT, token labels:cf_lvvit_nano:$two_stage" \
    --teacher "CF-ViT, LV-ViT, token labels" "plain 14x14"
