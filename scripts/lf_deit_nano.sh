#!/usr/bin/env bash
# LF-ViT nano on the embedded data set: bash scripts/lf_deit_nano.sh DATA OUTPUT
#
# 2 epochs of 64,000 images; the first 0.78 epochs train the location stage alone, with plain cross-entropy.
# Two one-thread processes train faster than one process with two threads.
# Measured (2 CPU cores, 5 minutes): see "Results" in the README.
set -euo pipefail
data=${1:-data/digits} output=${2:-output/lf_deit_nano}
OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node=2 main_deit.py \
    --model lf_deit_nano --data-path "$data" --output_dir "$output" --device cpu --num_workers 0 \
    --epochs 2 --coarse-only 0.39 --select-from 0 --batch-size 32 \
    --lr 2e-3 --unscale-lr --min-lr 0 --warmup-lr 0 --warmup-epochs 0.1 --opt-betas 0.9 0.98 --clip-grad 1 \
    --no-aug --no-repeated-aug --mixup 0 --cutmix 0 --smoothing 0 --drop-path 0 --no-model-ema \
    --crop-pct 1 --mean 0.15 0.15 0.15 --std 0.18 0.18 0.18 --print-freq 100
