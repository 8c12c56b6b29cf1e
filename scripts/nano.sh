#!/usr/bin/env bash
# Any nano model on the embedded data set: bash scripts/nano.sh MODEL DATA OUTPUT [further flags of main_deit.py]
#
# 128,000 images seen: 2 epochs of 64,000. Two-stage models want --coarse-only 0.39 --select-from 0: the first 0.78
# epochs train the first stage alone, with plain cross-entropy.
# Two one-thread processes train faster than one process with two threads.
# Measured, lf_deit_nano, 2 CPU cores: about 5 minutes; figures in the README, "Results".
set -euo pipefail
model=${1:?model} data=${2:?data folder} output=${3:?output folder}
# DistributedDataParallel warns where it looks for unused parameters and finds none, as after the first phase.
TORCH_CPP_LOG_LEVEL=ERROR OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node=2 main_deit.py \
    --model "$model" --data-path "$data" --output_dir "$output" --device cpu --num_workers 0 \
    --epochs 2 --cooldown-epochs 0 --batch-size 32 --drop-path 0 --no-model-ema --seed 0 \
    --lr 2e-3 --unscale-lr --min-lr 0 --warmup-lr 0 --warmup-epochs 0.1 --opt-betas 0.9 0.98 --clip-grad 1 \
    --aa none --color-jitter 0 --scale 1 1 --ratio 1 1 --hflip 0 --reprob 0 --no-repeated-aug \
    --mixup 0 --cutmix 0 --smoothing 0 \
    --crop-pct 1 --mean 0.15 0.15 0.15 --std 0.18 0.18 0.18 --print-freq 100 "${@:4}"
