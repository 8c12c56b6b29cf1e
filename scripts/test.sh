#!/usr/bin/env bash
# Sets up .venv if needed, then runs ruff and the tests: bash scripts/test.sh [--fast] [ARGUMENTS OF PYTEST]
# --fast leaves out the slow tests.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements-dev.txt
. scripts/env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one test process per core
ruff check .
ruff format --check .
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
python -m pytest -q -n auto --dist loadfile "$@"
