"""The house rules that a program can check: shape of the code, its borders, what it never calls."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    ROOT / "kvcodec",
    ROOT / "proto" / "kvcodec_proto",
    ROOT / "backends" / "kvcodec_backends",
    ROOT / "server" / "kvcodec_server",
)

MAX_MODULE_LINES = 420
MAX_TEST_MODULE_LINES = 600  # as long as its module asks for, and read one test at a time
MAX_FUNCTION_LINES = 80
# Larger things of the past, at their size of today. A number may go down, and has to when the code
# shrinks; nothing may be added.
LONGER_MODULES: dict[str, int] = {}
LONGER_FUNCTIONS: dict[str, int] = {}

# Bytes from a store must never become code. Of torch, only what reads pickles is listed.
BANNED_IMPORTS = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"})
BANNED_CALLS = frozenset(
    {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load", "numpy.load"}
)
NO_OFFERS = frozenset({"TypeVar", "ParamSpec", "TypeVarTuple", "logging.getLogger"})
ALIASED = frozenset({"npt.NDArray", "tuple", "list", "dict", "Callable"})
HEAVY_IMPORTS = ("fsspec", "google.protobuf", "grpc", "lmcache", "pytest", "sglang", "torch")


def git_files() -> list[Path]:
    """What a commit of this tree would hold: tracked files, and new ones not ignored by git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = (ROOT / name for name in listed.split("\0") if name)
    return sorted({path for path in paths if path.is_file()})


def is_generated(path: Path) -> bool:
    return re.search(r"_pb2(_grpc)?\.pyi?$", path.name) is not None


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = git_files()
WRITTEN = [path for path in FILES if path.suffix == ".py" and not is_generated(path)]
LIBRARY = [path for path in WRITTEN if any(package in path.parents for package in PACKAGES)]


def library_ids(path: Path) -> str:
    return name_of(path)


# --- sizes


def functions_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every function's dotted name and length in lines, its decorators left out."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                assert child.end_lineno is not None
                yield prefix + child.name, child.end_lineno - child.lineno + 1
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(tree, "")


def ratchet(found: dict[str, int], limit: int, allowed: dict[str, int]) -> list[str]:
    """What is wrong with these sizes: too large, or an exception that is no longer true."""
    wrong = [
        f"{name}: {size} lines, at most {max(limit, allowed.get(name, 0))}"
        for name, size in found.items()
        if size > max(limit, allowed.get(name, 0))
    ]
    wrong += [
        f"{name}: {found.get(name, 0)} lines now, its exception says {size}"
        for name, size in allowed.items()
        if found.get(name, 0) < size
    ]
    return wrong


def test_modules_are_short():
    found = {name_of(path): len(path.read_text().splitlines()) for path in WRITTEN}
    tests = {name: lines for name, lines in found.items() if name.startswith("tests/")}
    others = {name: lines for name, lines in found.items() if name not in tests}
    assert ratchet(tests, MAX_TEST_MODULE_LINES, {}) == []
    assert ratchet(others, MAX_MODULE_LINES, LONGER_MODULES) == []


def test_functions_are_short():
    found = {
        f"{name_of(path)}:{name}": size
        for path in WRITTEN
        for name, size in functions_of(ast.parse(path.read_text()))
    }
    assert ratchet(found, MAX_FUNCTION_LINES, LONGER_FUNCTIONS) == []


def test_ratchet_refuses_growth_and_stale_exceptions():
    assert ratchet({"a": 10}, 10, {}) == []
    assert ratchet({"a": 11}, 10, {}) != []
    assert ratchet({"a": 12}, 10, {"a": 12}) == []
    assert ratchet({"a": 13}, 10, {"a": 12}) != []
    assert ratchet({"a": 11}, 10, {"a": 12}) != []
    assert ratchet({}, 10, {"a": 12}) != []


# --- borders


def test_import_contracts_hold():
    """The import rules of pyproject.toml, [tool.importlinter]."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_package_is_typed(package: Path):
    assert (package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_folder_of_a_package_holds_that_package_only(package: Path):
    """Path equals import name: a second package or an __init__.py there would break that."""
    if package.parent == ROOT:
        return
    assert not (package.parent / "__init__.py").exists()
    others = [path for path in package.parent.glob("*/__init__.py") if path.parent != package]
    assert others == []


def test_import_loads_no_engine_and_no_network():
    code = (
        "import sys, kvcodec, kvcodec.cli, kvcodec_backends\n"
        f"print(*sorted(set({HEAVY_IMPORTS!r}) & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []


def public_names(tree: ast.Module) -> set[str]:
    """Names that the module itself defines at its top level and does not mark as private.

    Type variables, aliases of array types and loggers are no offer to anybody, and by custom have
    public names.
    """
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            if isinstance(node.value, ast.Call) and dotted(node.value.func) in NO_OFFERS:
                continue
            if isinstance(node.value, ast.Subscript) and dotted(node.value.value) in ALIASED:
                continue
            targets = [leaf for target in node.targets for leaf in ast.walk(target)]
            names.update(leaf.id for leaf in targets if isinstance(leaf, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def imported_names(tree: ast.Module) -> set[str]:
    """Names that the module imports from this project's packages, and may offer again."""
    own = tuple(package.name for package in PACKAGES)
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in own
        for alias in node.names
    }


def declared_all(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            targets: list[ast.expr] = [node.target]
        elif isinstance(node, ast.Assign):
            targets = node.targets
        else:
            continue
        if any(isinstance(name, ast.Name) and name.id == "__all__" for name in targets):
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    return None


PUBLIC_MODULES = [
    path
    for path in LIBRARY
    if not any(part.startswith("_") for part in path.with_suffix("").parts if part != "__init__")
]


@pytest.mark.parametrize("path", PUBLIC_MODULES, ids=library_ids)
def test_all_names_what_the_module_offers(path: Path):
    """__all__ holds every public name the module defines; a package may also re-export its own."""
    tree = ast.parse(path.read_text())
    offered = declared_all(tree)
    assert offered is not None, "no __all__"
    assert len(offered) == len(set(offered))
    defined = public_names(tree)
    assert defined <= set(offered), f"not in __all__: {sorted(defined - set(offered))}"
    unknown = set(offered) - defined - imported_names(tree)
    if "__getattr__" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
        unknown -= {leaf.value for leaf in ast.walk(tree) if isinstance(leaf, ast.Constant)}
    assert unknown - {"__version__"} == set()


# --- content


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def banned_uses(tree: ast.Module) -> list[str]:
    """Calls and imports, with the line, that turn data into code."""
    found: list[str] = []
    aliases = {"np": "numpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            first, _, rest = dotted(node.func).partition(".")
            name = ".".join(filter(None, (aliases.get(first, first), rest)))
            names = [name] if name in BANNED_CALLS else []
            found += [f"{node.lineno}: {name}" for name in names]
            continue
        else:
            continue
        banned = [
            name for name in names if name.split(".")[0] in BANNED_IMPORTS or name in BANNED_CALLS
        ]
        found += [f"{node.lineno}: {name}" for name in banned]
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=library_ids)
def test_library_never_turns_data_into_code(path: Path):
    assert banned_uses(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "eval('1')",
        "exec('1')",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f)",
        "from torch import load",
        "from yaml import load",
        "import yaml\nyaml.load(f)",
        "import numpy as np\nnp.load(f)",
    ],
)
def test_banned_code_is_found(code: str):
    assert banned_uses(ast.parse(code)) != []


def test_harmless_code_is_not_banned():
    code = "import re, yaml\nre.compile('x')\nyaml.safe_load(f)\nself.load(f)\nmodel.eval()"
    assert banned_uses(ast.parse(code)) == []


def texts() -> Iterator[tuple[Path, str]]:
    for path in FILES:
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a golden page or another binary file


def lines_that_match(pattern: str) -> list[str]:
    found = re.compile(pattern)
    return [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        if path != Path(__file__).resolve()
        for number, line in enumerate(text.splitlines(), 1)
        if found.search(line)
    ]


def test_no_unfinished_work_is_noted():
    assert lines_that_match(r"\b(TODO|FIXME)\b") == []


def test_no_file_names_a_developers_machine():
    places = [r"/home/[a-z]\w*/", r"/Users/\w+/", r"/root/\."]
    if len(ROOT.parts) > 2:  # a checkout in /app would find every container path
        places.append(re.escape(str(ROOT)) + r"\b")
    assert lines_that_match("|".join(places)) == []


def test_no_file_chooses_a_package_index():
    assert lines_that_match(r"index-url|index_url|--find-links|/simple/") == []


def test_changelog_has_an_unreleased_section():
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_decision_notes_are_dated_and_name_rejected_options():
    notes = [path for path in (ROOT / "docs" / "decisions").glob("*.md") if path.stem != "README"]
    assert notes
    for note in notes:
        assert re.match(r"\d{4}-\d{2}-\d{2}-[a-z0-9-]+$", note.stem), note.name
        assert re.search(r"^## Rejected", note.read_text(), re.MULTILINE), note.name
