"""Tests of the repository's shape: what stands at the top, who imports whom, that only models/ knows methods.

They also read its documentation: links, file tree, code.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import timm
import torch
from cases import ROOT, run

from models import Adaptive, AdaptiveViT
from models.registry import registered

FOLDERS = ("models", "loading", "checkpointing", "inference", "benchmarks", "scripts")
COMMANDS = ("main_deit", "dynamic_inference", "visualize")
TOP = {f"{name}.py" for name in (*COMMANDS, "engine", "datasets", "utils")}
TOP |= {"README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", *FOLDERS, "tests", "docs"}
TOP |= {"requirements.txt", "requirements-extra.txt", "requirements-dev.txt", "requirements.lock"}

# Lowest first: a module imports what stands on its own level or before it, and a command no other command.
LEVELS = [
    ("utils",),
    ("checkpointing.format", "checkpointing.schema"),
    ("models",),
    ("loading",),
    ("datasets",),
    ("engine",),
    ("checkpointing",),
    ("inference",),
    ("benchmarks",),
    COMMANDS,
    ("scripts",),
]

# Keys of an info that are also fields of models.vit.Picture, which anyone may read and name a column after:
# such a string may stand alone, but is no key of a dict.
PICTURE_FIELDS = {"region", "kept", "depth"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the project outside the tests, under the name by which it is imported; scripts, which
    are no package, as scripts.<name>."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


@cache
def imports(name: str) -> dict[str, int]:
    """Modules of the project that a module imports, at any depth of its code, with the line."""
    imported: dict[str, int] = {}
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            names = [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: imports are absolute"
            names = [[f"{node.module}.{alias.name}", node.module] for alias in node.names]
        else:
            continue
        for candidates in names:  # from a.b import c is a module a.b.c, or else something of a.b
            candidates += [f"scripts.{candidate}" for candidate in candidates if name.startswith("scripts.")]
            known = [candidate for candidate in candidates if candidate in modules()]
            imported |= {known[0]: node.lineno} if known else {}
    imported.pop(name, None)  # a script that is run may import itself under its name
    return imported


def level(name: str) -> int:
    """Number of the level on which a module stands: that of the longest entry which is it or its folder."""
    entries = [(entry, number) for number, entries in enumerate(LEVELS) for entry in entries]
    return max((len(entry), number) for entry, number in entries if f"{name}.".startswith(f"{entry}."))[1]


def test_top_level_is_the_agreed_one() -> None:
    ignored = {line.strip("/\n") for line in open(ROOT / ".gitignore")}
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - ignored
    assert there == TOP


def test_nothing_imports_upward() -> None:
    wrong = [
        f"{name}, line {line}: imports {other}"
        for name in modules()
        for other, line in imports(name).items()
        if level(other) > level(name) or (name in COMMANDS and other in COMMANDS)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle() -> None:
    graph = {name: set(imports(name)) for name in modules()}
    graph["models"] |= {name for name in modules() if name.startswith("models.")}  # all that is in the folder
    TopologicalSorter(graph).prepare()  # CycleError names the circle


# Only models/ knows a method


@cache
def methods() -> dict[str, type[Adaptive]]:
    """Class of every registered name that is more than the plain model; methods that a test adds left out."""
    classes = {name: cls for name, (cls, _) in registered.items()}
    own = {name: cls for name, cls in classes.items() if cls.__module__.startswith("models.")}
    return {name: cls for name, cls in own.items() if cls is not AdaptiveViT}


@cache
def name_pattern() -> re.Pattern[str]:
    """Registered names, classes and modules of the methods; their papers' names as one writes them: A-ViT."""
    classes = {base for cls in methods().values() for base in cls.__mro__ if issubclass(base, AdaptiveViT)}
    classes = (classes | set(methods().values())) - {AdaptiveViT}
    own = {cls.__module__.removeprefix("models.") for cls in classes}
    assert {"lf_vit", "cf_vit", "lv_vit", "evit", "dvt", "a_vit", "t2t", "two_stage"} <= own
    words = [re.escape(word) for word in {*methods(), *own, *(cls.__name__ for cls in classes)}]
    # a_vit: A-ViT, avit_...; two-stage is English.
    words += [f"(?i:{name.replace('_', '[-_]?')})" for name in own - {"two_stage"}]
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(sorted(words))})(?![A-Za-z0-9])")


@cache
def flag_pattern() -> re.Pattern[str]:
    """Flags that the methods declare, and the attributes of parsed arguments that hold them.

    Attributes of one word (alpha) are left out: other libraries have arguments of these names.
    """
    declared = {flag for cls in methods().values() for flag in cls.flags}
    assert "--keep-rate" in {name for flag in declared for name in flag.spellings}
    flags = {re.escape(name) for flag in declared for name in flag.spellings}
    names = {name for flag in declared for name in (*flag.words, flag.target) if "_" in name}
    return re.compile(rf"(?:{'|'.join(sorted(flags))})(?![\w-])|\b(?:{'|'.join(sorted(names))})\b")


@cache
def info_keys() -> set[str]:
    """Keys of the infos of every method at its smallest, in training and evaluation; kept_1 as kept_."""
    keys: set[str] = set()
    for model in (timm.create_model(name) for name in methods() if "nano" in name):
        for training in (True, False):
            model.train(training)
            for output in model(torch.zeros(2, 3, model.img_size, model.img_size)):
                keys |= {key.rstrip("0123456789") for key in output.info}
    assert {"cls_attn", "kept", "kept_", "rho", "relation"} <= keys
    return keys


def key_of(node: ast.AST) -> tuple[ast.AST, ast.AST] | None:
    """Mapping and key of mapping[key], mapping.get(key), mapping.pop(key) or key in mapping; else None."""
    match node:
        case ast.Subscript(value=mapping, slice=key):
            return mapping, key
        case ast.Call(func=ast.Attribute(value=mapping, attr="get" | "pop"), args=[key, *_]):
            return mapping, key
        case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[mapping]):
            return mapping, key
    return None


def read_keys(text: str) -> Iterator[tuple[int, str]]:
    """Lines that name a key of an info: any string that some method has as a key, any constant key of
    something that is called info."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            key = node.value.rstrip("0123456789")
            if key in info_keys() - PICTURE_FIELDS:
                yield node.lineno, repr(node.value)
        elif (lookup := key_of(node)) and isinstance(lookup[1], ast.Constant):
            mapping, key = lookup
            name = getattr(mapping, "attr", getattr(mapping, "id", None))
            if name == "info" or key.value in PICTURE_FIELDS:
                yield node.lineno, ast.unparse(node)


def named_methods(text: str) -> Iterator[tuple[int, str]]:
    return matches(name_pattern(), text)


def named_flags(text: str) -> Iterator[tuple[int, str]]:
    return matches(flag_pattern(), text)


def matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    """Lines of a text in which a pattern occurs, and what of them fits."""
    for number, line in enumerate(text.splitlines(), 1):
        yield from ((number, match[0]) for match in pattern.finditer(line))


@pytest.mark.parametrize("search", [named_methods, named_flags, read_keys])
def test_only_models_knows_a_method(search: Callable[[str], Iterator[tuple[int, str]]]) -> None:
    """No Python file outside models/ and tests/ names a method, its flags or what it puts into an info."""
    paths = sorted(path for name, path in modules().items() if not f"{name}.".startswith("models."))
    named = [
        f"{path.relative_to(ROOT)}:{number}: {what}"
        for path in paths
        for number, what in search(path.read_text())
    ]
    assert not named, "\n".join(named)


@pytest.mark.parametrize(
    "code",
    [
        'info["x"]',
        'output.info["x"]',
        'info.get("x")',
        '"x" in out.info',
        'f(["cls_attn"])',
        'f"kept_{i}"',
        'row["kept"]',
        'row.get("depth")',
    ],
)
def test_every_way_to_read_an_info_is_seen(code: str) -> None:
    assert list(read_keys(code))
    assert not list(read_keys('table = ["class", "region"]; x = picture.region; y = depth["x"]'))


# Documentation

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert not file.startswith("/") and (page.parent / file).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", (page.parent / file if file else page).read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, (
                target
            )


def test_tree_of_the_readme_is_complete() -> None:
    """Every module has its line, and every file that a line names is there."""
    tree = (ROOT / "README.md").read_text().split("## Files")[1].split("```")[1]
    folder, listed = Path(), set()
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            folder = Path()
        for word in line.strip().split("  ")[0].split():
            if word.endswith("/"):
                folder = Path(word)
            else:
                listed.add(folder / word)
    assert [str(path) for path in sorted(listed) if not (ROOT / path).exists()] == []
    wanted = {
        path.relative_to(ROOT) for path in modules().values() if path.name not in ("__init__.py", "_root.py")
    }
    assert sorted(map(str, wanted - listed)) == []


@pytest.mark.slow
def test_python_of_the_readme_runs(folder: Path, trained: Path) -> None:
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "output/quickstart/checkpoint.pth" in code and "data/digits" in code
    code = code.replace("output/quickstart/checkpoint.pth", str(trained / "checkpoint.pth"))
    ended = run("-c", code.replace("data/digits", str(folder)))
    assert ended.returncode == 0, ended.stderr


TRY_SKELETON = """
import timm, torch
from engine import early_exit
from models.cost import exit_gflops
from models.flags import declared_flags
model = timm.create_model("topk_deit_nano", num_classes=3, count=60, after=1).eval()
images = torch.randn(2, 3, 56, 56)
logits, _ = early_exit(model, images, [])
assert logits.shape == (2, 3) and torch.equal(logits, model(images)[0].logits)
assert model.picture(model(images)[0].info).kept[0].shape == (2, 60)
costly = exit_gflops(model)
model.count = 20
assert exit_gflops(model) < costly
assert "--count" in {name for flag in declared_flags() for name in flag.spellings}
"""


@pytest.mark.slow
def test_skeleton_of_the_guide_works() -> None:
    code = (ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]
    ended = run("-c", code + TRY_SKELETON)
    assert ended.returncode == 0, ended.stderr


def test_the_hooks_have_the_tested_ruff() -> None:
    hooks, lock = (ROOT / name for name in (".pre-commit-config.yaml", "requirements.lock"))
    assert set(re.findall(r"ruff==[\d.]+", hooks.read_text())) == set(
        re.findall("ruff==.*", lock.read_text())
    )
