"""Puts the repository's root on the path: every script imports this first and so runs from any folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if Path(getattr(sys.modules["__main__"], "__file__", None) or ROOT).resolve().parent == ROOT / "scripts":
    from checkpointing.interrupt import exit_on_interrupt

    exit_on_interrupt()
