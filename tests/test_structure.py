"""What holds for the package as a whole: its floors, its options, and what it must not contain."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jgrpo
from jgrpo.config import Config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jgrpo"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): ast.parse(file.read_text("utf-8"))
    for file in FILES
}

# Floors of the house (docs/architecture.md): a room is a folder, or a file beside the folders. It
# imports from floors below its own, and within itself; the files of a floor, from each other.
FLOORS = [
    {"config", "checks", "errors", "home", "losses", "advantages", "estimators", "members"},
    {"answers"},
    {"policy", "prompts"},
    {"update", "rollout", "rewards"},
    {"run"},
    {"study", "page", "cli", "flags"},
    {
        "train",
        "evaluate",
        "serve",
        "replay",
        "ablate",
        "plot",
        "runs",
        "view",
        "show",
        "export",
        "filter",
        "__init__",
        "__main__",
    },
    {"tiny"},
]
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS, 1) for room in rooms}
FOLDERS = {file.parent.name for file in FILES} - {"jgrpo"}
PURE = ("advantages", "losses", "estimators", "answers.latex", "answers.algebra", "answers.equal",
        "answers.box", "answers.rewrite", "answers.units", "answers.interval", "answers.characters",
        "answers.choice",
        "answers.dress", "answers.names", "answers.scalar", "answers.shape",
        "policy.backend", "policy.remat", "policy.rope", "policy.tape", "policy.lora",
        "policy.batch",
        "rollout.protocol")  # fmt: skip
LIGHT = ("errors", "home", "config", "cli", "checks", "advantages", "serve", "answers.equal",
         "answers.grader", "rewards.parts", "rollout.protocol", "rollout.server", "rollout.vllm",
         "run.rundir", "study.variants")  # fmt: skip


def room(module: str) -> str:
    return module.split(".")[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Our modules that a file imports, also inside functions; `from room import name` as room.name,
    whether that name is a file or what the room hands on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and room(node.module or "") == "jgrpo":
            where = node.module.split(".")[1:]
            names = [".".join((*where, alias.name)) for alias in node.names]
            yield from (".".join(where) if ".".join(where) in TREES else name for name in names)
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (".".join(name[1:]) for name in names if name[0] == "jgrpo" and name[1:])


def outside(tree: ast.AST) -> set[str]:
    """Top-level names of the other packages that a file imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names - {"jgrpo"}


def test_every_room_has_a_floor():
    assert set(FLOOR_OF) == {room(module) for module in TREES}


@pytest.mark.parametrize("module", TREES)
def test_imports_point_down(module):
    own = room(module)
    for name in map(room, imported(TREES[module])):
        beside = name not in FOLDERS and own not in FOLDERS and FLOOR_OF[name] == FLOOR_OF[own]
        ok = name == own or beside or FLOOR_OF[name] < FLOOR_OF[own]
        assert ok, f"{module} (floor {FLOOR_OF[own]}) imports {name} (floor {FLOOR_OF[name]})"


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_room_says_what_it_is_for(folder):
    tree = TREES[f"{folder}.__init__"]
    assert len(ast.get_docstring(tree).splitlines()) <= 3
    assert not [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]


def test_tests_mirror_the_rooms():
    """A test of jgrpo/policy/model.py is tests/policy/test_model.py."""
    for file in (ROOT / "tests").glob("*/test_*.py"):
        assert file.parent.name in FOLDERS, file


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_knows_no_config_and_touches_no_files(module):
    pure = {"errors", *(name.split(".")[-1] for name in PURE)}
    assert not {name.split(".")[-1] for name in imported(TREES[module])} - pure
    assert not outside(TREES[module]) & {"os", "io", "shutil", "subprocess", "httpx", "rich"}
    calls = {n.func.id for n in ast.walk(TREES[module])
             if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
    assert not calls & {"open", "print", "input"}


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_does_not_wait_for_jax(module):
    """These answer --help and mistakes, or run in the grader's processes: at once."""
    check = (
        f"import sys, jgrpo.{module}; print(sorted({{'jax', 'torch', 'flax'}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# -- options ----------------------------------------------------------------------------------


def reads(tree: ast.AST) -> set[str]:
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and
            isinstance(n.ctx, ast.Load)}  # fmt: skip


def properties() -> dict[str, set[str]]:
    """Config's own properties: name -> the fields that each reads."""
    [config] = [n for n in TREES["config"].body if getattr(n, "name", "") == "Config"]
    return {
        f.name: reads(f) for f in config.body if isinstance(f, ast.FunctionDef) and f.decorator_list
    }


NOT_USE = ("config", "checks", "cli", "flags")


def test_every_option_is_read_outside_config_and_serves_something():
    read = set().union(*(reads(TREES[m]) for m in TREES if m not in NOT_USE))
    read |= set().union(*(fields for name, fields in properties().items() if name in read))
    unread = {f.name for f in dataclasses.fields(Config)} - read
    assert not unread


def test_every_option_says_what_it_means():
    [config] = [n for n in TREES["config"].body if getattr(n, "name", "") == "Config"]
    fields = [n for n in config.body if isinstance(n, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(Config))
    for field in fields:
        after = config.body[config.body.index(field) + 1]
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        long_enough = is_text and len(after.value.value) > 10
        assert long_enough, field.target.id


# -- what must not be in it -------------------------------------------------------------------

CHECKED = [
    file
    for pattern in ("jgrpo/**/*.py", "tests/**/*.py", "configs/*", "benchmarks/*.py", "docs/*",
                    "*.md", "*.toml", ".ci/*")
    for file in ROOT.glob(pattern)
    if file.is_file() and file.suffix in {".py", ".md", ".toml", ""}
]  # fmt: skip


@pytest.mark.parametrize("file", CHECKED, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_path_of_somebody_s_machine(file):
    found = re.findall(r"(?<![\w.])/(?:work|home|Users|root|mnt|data|opt)/\w+", file.read_text())
    assert not found


@pytest.mark.parametrize("module", TREES)
def test_nothing_that_runs_text_as_code(module):
    tree = TREES[module]
    assert not outside(tree) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = getattr(call.func, "id", None)
        assert name not in {"eval", "exec", "compile", "sympify", "parse_expr"}
        called = getattr(call.func, "attr", name)
        assert called not in {"sympify", "parse_expr", "system"}
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        for option in ("trust_remote_code", "shell", "allow_pickle"):
            if option in options:
                assert getattr(options[option], "value", True) is False
        if called == "from_pretrained" and isinstance(call.func.value, ast.Name):
            assert "trust_remote_code" in options  # an explicit no


@pytest.mark.parametrize("module", TREES)
def test_no_bare_except(module):
    for handler in (n for n in ast.walk(TREES[module]) if isinstance(n, ast.ExceptHandler)):
        assert handler.type is not None


# -- shape of the text ------------------------------------------------------------------------


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes, and the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (n for n in node.body if isinstance(n, kinds))
                yield from ((f"{node.name}.{n.name}", n) for n in methods if n.name[0] != "_")


@pytest.mark.parametrize("module", TREES)
def test_whatever_is_public_and_longer_than_ten_lines_has_a_docstring(module):
    """So has every module; of a `main` the module's own says what it does."""
    assert ast.get_docstring(TREES[module])
    for name, node in definitions(TREES[module]):
        short = node.end_lineno - node.lineno < 11
        assert short or name == "main" or ast.get_docstring(node), f"{module}.{name}"


def test_files_are_still_found_under_the_names_they_had_before_the_rooms():
    for old, place in jgrpo._MOVED.items():
        new = importlib.import_module(f"jgrpo.{place}.{old}")
        public = next(
            n for n in vars(new) if getattr(vars(new)[n], "__module__", "") == new.__name__
        )
        assert getattr(importlib.import_module(f"jgrpo.{old}"), public) is vars(new)[public]
    from jgrpo import weights

    assert weights.load_model is importlib.import_module("jgrpo.policy.weights").load_model


def test_the_tests_that_the_docs_name_are_there():
    files = {file.stem: file for file in (ROOT / "tests").rglob("test_*.py")}
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    names = set(re.findall(r"\btest_[a-z_]+", text))
    assert names
    assert names <= files.keys()
    paths = set(re.findall(r"tests/[a-z_/]+\.py", text))
    assert all((ROOT / path).is_file() for path in paths)
    for name, words in re.findall(r"(test_[a-z_]+) ((?:`[a-z_]+`,? ?)+)", text):
        source = files[name].read_text("utf-8")
        for word in re.findall(r"`([a-z_]+)`", words):
            assert re.search(rf"def test_\w*{word}", source), f"{name}: {word}"
