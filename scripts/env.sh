# Sourced by the other scripts, from the root of the repo: puts .venv first on the PATH, and makes it or adds
# what it lacks of the file that $requirements names (default: requirements.txt).
# The tested versions are installed; where they do not exist for this Python, those that the ranges allow.
requirements=${requirements:-requirements.txt}
stamp=.venv/installed-$requirements
if ! .venv/bin/python -c '' 2>/dev/null || [ ! -e "$stamp" ] || [ -n "$(find requirements* -newer "$stamp")" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 2; }
    python3 -m venv .venv || { echo "python3 -m venv failed: install your system's python3-venv package" >&2; exit 2; }
    echo "installing $requirements into .venv (PyTorch is large: this takes a few minutes)"
    .venv/bin/pip install --quiet --disable-pip-version-check -r "$requirements" -c requirements.lock ||
        .venv/bin/pip install --quiet --disable-pip-version-check -r "$requirements"
    touch .venv/installed-requirements.txt "$stamp"  # every other file includes requirements.txt
fi
PATH="$PWD/.venv/bin:$PATH"
