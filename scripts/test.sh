#!/usr/bin/env bash
# Sets up .venv if needed and runs the tests; arguments go to pytest. About 8 minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements-dev.txt
. scripts/env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
python -m pytest -q "$@"
