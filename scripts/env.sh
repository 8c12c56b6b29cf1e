# Sourced by the other scripts, from the root of the repo: makes .venv once and puts it first on the PATH.
# The tested versions are installed; where they do not exist for this Python, the ranges of requirements.txt.
if ! .venv/bin/python -c 'import torch, timm' 2>/dev/null || [ requirements.lock -nt .venv/installed ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 2; }
    python3 -m venv .venv || { echo "python3 -m venv failed: install your system's python3-venv package" >&2; exit 2; }
    echo "installing into .venv (PyTorch is large: this takes a few minutes)"
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock ||
        .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
    touch .venv/installed
fi
PATH="$PWD/.venv/bin:$PATH"
