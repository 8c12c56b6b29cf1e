#!/usr/bin/env bash
# LF-ViT from nothing: environment, data, training, early exit, pictures, a closing table.
# No data and no GPU needed; 8 to 14 minutes on 2 CPU cores after the installation.
#
#   bash scripts/quickstart.sh [OUTPUT]      default: output/quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
data=data/digits output=${1:-output/quickstart}
begun=$SECONDS

step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - begun)); }

step "data: cluttered digits"
python scripts/make_digits.py --output "$data"

checkpoint=$output/checkpoint.pth
if [ -e "$output/results.json" ]; then
    step "training: already done, delete $output to train again"
else
    step "training lf_deit_nano, two processes"
    bash scripts/nano.sh lf_deit_nano "$data" "$output" --coarse-only 0.39 --select-from 0
fi

infer() { python dynamic_inference.py --data_url "$data" --checkpoint_path "$checkpoint" --num_workers 0 "$@"; }
step "eval mode 0: accuracy of each exit, and of the region"
infer --eval-mode 0 --split test --boxes "$data/boxes.csv" --results "$output/results.json"
step "eval mode 1: threshold sweep, on the validation images (kept in the checkpoint) and on the test images"
infer --eval-mode 1
infer --eval-mode 1 --split test --results "$output/results.json" >/dev/null
step "eval mode 2: early exit against the plain model, timed"
infer --eval-mode 2 --split test --threshold 0.7 --baseline deit_nano --results "$output/results.json"
step "eval mode 3: what the checkpoint holds"
infer --eval-mode 3 | sed -n '1,/^$/p'  # the curve follows

step "pictures"
python visualize.py --resume "$checkpoint" --data-path "$data" --split test --output_dir "$output/pictures" --num-images 16
python visualize.py --resume "$checkpoint" --curve --output_dir "$output/pictures"

step "done"
python scripts/report.py "$checkpoint" "$output/results.json"
