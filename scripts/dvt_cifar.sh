#!/usr/bin/env bash
# A trained DVT to CIFAR at 224 pixels, one GPU: bash scripts/dvt_cifar.sh WEIGHTS OUTPUT [CIFAR10|CIFAR100] [MODEL] [DATA]
#
# T2T-ViT's transfer (60 epochs of SGD on batches of 64, plain cross-entropy), except: one learning rate for all, where
# T2T-ViT gives the body a hundredth of the head's, and a random crop of 76 to 100 % of the area, where it shifts by up
# to 28 pixels. Heads of other classes start anew; WEIGHTS of T2T-ViT or DeiT-S start all three exits.
# Not run here; time not measured.
set -euo pipefail
weights=${1:?checkpoint} output=${2:?output folder} set=${3:-CIFAR10} model=${4:-dvt_t2t_vit_12} data=${5:-data}
python main_deit.py --model "$model" --finetune "$weights" --data-set "$set" --data-path "$data" --download \
    --output_dir "$output" --epochs 60 --cooldown-epochs 0 --warmup-epochs 0 --batch-size 64 --opt momentum \
    --momentum 0.9 --weight-decay 5e-4 --lr 5e-3 --unscale-lr --min-lr 2e-4 --no-model-ema --scale 0.76 1 --ratio 1 1 \
    --aa none --color-jitter 0 --reprob 0 --no-repeated-aug --mixup 0 --cutmix 0 --smoothing 0 --crop-pct 1 \
    --mean 0.4914 0.4822 0.4465 --std 0.2023 0.1994 0.2010 --amp
