#!/usr/bin/env bash
# Long form of what the tests try in passing: bash scripts/torture.sh [KILLS] [CASES]
#
# Trains a tiny model, kills the run KILLS times (50) at random moments, resumes it each time and compares all that is
# left with an undisturbed run, bit for bit; then calls the commands CASES times (200) each with random flags, with
# broken checkpoints and with broken images. Prints the counts. Takes about ten minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python scripts/torture.py --model lf_deit_nano --kills "${1:-50}"
report=$(mktemp)
FUZZ_CASES="${2:-200}" FUZZ_REPORT="$report" python -m pytest -q tests/test_fuzz.py
cat "$report"
rm "$report"
