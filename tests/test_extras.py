"""Packages of requirements-extra.txt: the commands start without them."""

import re

import pytest
from cases import ROOT, run

pytestmark = pytest.mark.slow

CODE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {"lmdb", "webdataset", "submitit"} or name.startswith("datasets."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import main_deit, dynamic_inference, visualize
print(sys.modules["datasets"].__file__)
"""


def test_commands_import_without_the_extra_packages() -> None:
    ended = run("-c", CODE)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(ROOT / "datasets.py")  # not the Hugging Face package


def test_every_extra_package_is_blocked_above() -> None:
    lines = (ROOT / "requirements-extra.txt").read_text().splitlines()
    names = {re.match(r"\w+", line)[0] for line in lines if not line.startswith("#")}
    assert names == {"lmdb", "webdataset", "datasets", "submitit"}
