"""What the README tells a newcomer to type, and the files that it names, exist."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jgrpo
from jgrpo import ablate, cli
from jgrpo.config import Config, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0] for block in BLOCKS for line in block.splitlines() if line]
OF_A_CONFIG = r"-m jgrpo\.(train|evaluate|serve|ablate)\b"  # the others look into a run at once
MODULES = sorted(set(re.findall(r"python -m jgrpo\.(\w+)", README)))


@pytest.mark.parametrize("module", MODULES)
def test_commands_are_modules(module):
    files = ROOT / "jgrpo" / f"{module}.py", ROOT / "jgrpo" / module / "__main__.py"
    assert any(file.is_file() for file in files)


@pytest.mark.parametrize("line", [c for c in COMMANDS if re.search(OF_A_CONFIG, c)])
def test_command_lines_are_understood(line, monkeypatch):
    """Every flag exists and every config loads; runs that a newcomer will have made do not yet."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "resumed_config", lambda run: load_config("configs/tiny.py"))
    monkeypatch.setattr(cli, "last_adapter", lambda run: run / "adapters" / "step_000040")
    monkeypatch.setattr(cli, "adapter_of", lambda run, _: run / "adapters" / "step_000040")
    words = shlex.split(line)
    words = words[words.index("-m") + 1 :]
    if words[0] == "jgrpo.ablate":
        assert ablate.parse(words[1:])
        return
    kind = {"train": cli.Train, "evaluate": cli.Evaluate, "serve": cli.Serve}[words[0][6:]]
    arguments = words[1 : words.index("--")] if "--" in words else words[1:]
    assert cli.parse(kind, arguments).options.lora_r >= 1


def test_files_that_are_named_exist():
    named = re.findall(r"(?:configs|docs|benchmarks|jgrpo)/[\w./]+\.(?:py|md|png)", README)
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def is_long(block: str) -> bool:
    return "train(" in block


@pytest.mark.usefixtures("shared_compilation_cache")
@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=[pytest.mark.slow] if is_long(b) else []) for b in PYTHON],
    ids=range(len(PYTHON)),
)
def test_python_blocks_run_as_they_stand(block, tmp_path, monkeypatch):
    """In a folder that has the clone's, so that nothing is written into the clone."""
    for name in ("jgrpo", "configs", "boxed.prompt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
def test_the_algorithm_on_a_page_learns(tmp_path):
    """docs/loop.py: at most 80 lines, of public names alone, and it reaches 80 %."""
    file = ROOT / "docs" / "loop.py"
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= 80
    assert set(re.findall(r"jgrpo\.(\w+)", text)) - {"train"} <= set(jgrpo.__all__)
    # It computes longer than the other tests: XLA's optimizations are worth their time, LLVM's not.
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("level=0", "level=1")}
    done = subprocess.run([sys.executable, file], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("held out: ")[1]) >= 0.8, done.stdout


def test_python_names_exist():
    assert {"load_model", "save_adapter"} <= set(dir(jgrpo))
    flags = set(re.findall(r"--(\w+)", " ".join(c for c in COMMANDS if "jgrpo.train" in c)))
    known = {f.name for f in dataclasses.fields(Config)} | {"config", "resume", "no_std_norm"}
    assert flags <= known


def test_extras_that_are_named_exist():
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    for extras in re.findall(r"-e '?\.\[([\w,-]+)\]", README):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra
