"""Puts the repository's root on the path: every script imports this first and so runs from any folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
