"""What comes from others (models, adapters, checkpoints, data sets, rows) is read and never run,
writes nothing outside the run folder, and the server's key is written nowhere.

Each trap leaves a file if it is sprung; that it can be sprung is tested first.
"""

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import stat
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_run import tiny_config, write_base, write_problems

from jgrpo.config import Config, load_config
from jgrpo.errors import InputError, RunError
from jgrpo.policy.adapter import load
from jgrpo.policy.lora import split
from jgrpo.policy.weights import abstract_model, load_model
from jgrpo.prompts.rows import read_splits
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.policy import open_policy
from jgrpo.run.rundir import run_id, write_config
from jgrpo.run.session import open_problems
from jgrpo.train import train

ROOT = Path(__file__).parent.parent
KEY = "sk-never-to-be-written"


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


@pytest.fixture
def sprung(tmp_path) -> Path:
    """What exists once a trap was sprung."""
    return tmp_path / "sprung"


@pytest.fixture
def pickled(sprung) -> bytes:
    return pickle.dumps(Trap(sprung))


def script(sprung: Path) -> str:
    return f"import os\nos.mkdir({str(sprung)!r})\nclass Own: pass\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("security")
    write_base(root / "base")
    write_problems(root)
    return root


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "place"))


def test_the_traps_can_be_sprung(sprung, pickled):
    pickle.loads(pickled)
    assert sprung.is_dir()
    sprung.rmdir()
    exec(script(sprung))
    assert sprung.is_dir()


# -- nothing is unpickled, nothing is imported ------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_that_is_a_pickle_is_refused_unread(name, root, sprung, pickled):
    (root / "base" / "model.safetensors").unlink()
    (root / "base" / name).write_bytes(pickled)
    with pytest.raises(InputError, match=r"never read|is damaged"):
        load_model(root / "base")
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter_that_is_a_pickle_is_refused_unread(name, root, sprung, pickled):
    (root / "a").mkdir()
    (root / "a" / name).write_bytes(pickled)
    like = split(abstract_model(root / "base", rank=1, target_modules=("q_proj",)))[1]
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load(root / "a", like)
    assert not sprung.exists()


@pytest.mark.parametrize("model_type", ["qwen3", "own"])
def test_code_in_a_model_s_folder_never_runs(model_type, root, sprung):
    base = root / "base"
    (base / "own.py").write_text(script(sprung))
    for name in ("config", "tokenizer_config"):
        content = json.loads((base / f"{name}.json").read_text())
        content["auto_map"] = {
            "AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own",
            "AutoTokenizer": ["own.Own", "own.Own"],
        }  # fmt: skip
        if name == "config":
            content["model_type"] = model_type
        else:
            content["tokenizer_class"] = "Own"
        (base / f"{name}.json").write_text(json.dumps(content))
    refused = pytest.raises(InputError, match="needs code of its own, which is never run")
    with refused if model_type == "own" else contextlib.nullcontext():  # qwen3 needs none of it
        open_problems(tiny_config(root))
        open_policy(tiny_config(root))
    assert not sprung.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('SPRUNG') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_chat_template_is_kept_in_its_sandbox(attack, root, sprung):
    attack = attack.replace("SPRUNG", str(sprung))
    (root / "base" / "chat_template.jinja").write_text(attack)
    with pytest.raises(InputError, match=r"chat template of .*base cannot write"):
        open_problems(tiny_config(root))
    assert not sprung.exists()


@pytest.mark.parametrize("script_name", ["data.py", "loader.py", "train.py"])
@pytest.mark.parametrize("with_rows", [True, False])
def test_a_data_set_s_script_and_pickles_never_run(
    script_name, with_rows, tmp_path, sprung, pickled, monkeypatch
):
    """datasets refuses a script of the folder's own name, and passes by others."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / script_name).write_text(script(sprung))
    for name in ("train.pkl", "cache.pickle", "train.pt"):
        (folder / name).write_bytes(pickled)
    if with_rows and script_name != "data.py":
        row = {"question": "1 + 1?", "answer": "2"}
        (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
        assert read_splits(str(folder)) == {"train": [row]}
    else:
        with pytest.raises(InputError, match="folder"):
            read_splits(str(folder))
    assert not sprung.exists()


def test_a_config_file_is_code_and_the_readme_says_so(tmp_path, sprung):
    (tmp_path / "c.py").write_text(
        script(sprung) + "from jgrpo.config import Config\nconfig = Config()\n"
    )
    assert load_config(tmp_path / "c.py") == Config()
    assert sprung.is_dir()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "Config files are Python and are executed: read one before you run it." in readme


# -- nothing is written elsewhere -------------------------------------------------------------


HOSTILE = ("../../x", "/x/y", "a\0b", "~/x", "$(mkdir x)", "\x1b]0;x\a", "%2e%2e%2fx", "CON")


@pytest.mark.slow
def test_a_run_passes_by_pickles_and_writes_within_its_folder_alone(
    root, sprung, pickled, monkeypatch
):
    """Names that lead elsewhere: in the rows' answers and columns, and of the model's folder and
    the run's. Pickles beside whatever is read, then the run is resumed."""
    monkeypatch.chdir(root)
    base = (root / "base").rename(root / "..%2f..%2fx")
    plant = lambda folder, *names: [(folder / n).write_bytes(pickled) for n in names]  # noqa: E731
    plant(base, "pytorch_model.bin", "model.pt", "tokenizer.pkl", "training_args.bin")
    for name in ("train", "eval"):
        rows = map(json.loads, (root / f"{name}.jsonl").read_text().splitlines())
        hostile = (
            {**row, "answer": f"#### {text}", "../../x": text, "/x": 1}
            for row, text in zip(rows, itertools.cycle(HOSTILE))
        )
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hostile))
    before = set(root.parent.rglob("*"))
    config = tiny_config(
        root, model_id=str(base), run_dir=str(root / "..%2frun"), n_grpo_steps=1, eval_every=0
    )
    run = train(config)
    assert (run / "rollouts" / "step_000001.jsonl").is_file()
    new = set(root.parent.rglob("*")) - before
    assert {path for path in new if path != run and run not in path.parents} == set()
    for path in new:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert not path.is_symlink()
        assert not mode & (stat.S_IWOTH | stat.S_ISUID | stat.S_ISGID)
        assert path.is_dir() or not mode & 0o111  # nothing that could be started
    for folder in [run, *(path for path in new if path.is_dir())]:
        plant(folder, "adapter_model.bin", "state.pkl", "checkpoint.pt", "optimizer.bin")
    train(config, resume=run)
    assert not sprung.exists()


def test_a_run_s_name_on_the_server_has_no_path_in_it():
    for folder in ("../../x", "/x/../y", "a\0b/c", "..%2f/..", "x/\x1b[31m", "é/ /"):
        assert set(run_id(Path(folder))) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
        )


@pytest.mark.parametrize("field", ["run_dir", "base_dir", "model_id", "dataset_path", "vllm_url"])
def test_a_name_with_a_nul_is_refused(field):
    with pytest.raises(InputError, match=f"{field}=.*must not hold a NUL"):
        Config(**{field: "http://a\0b"})


# -- keys -------------------------------------------------------------------------------------


class Guarded(BaseHTTPRequestHandler):
    """Answers whoever brings the key, as vLLM does under --api-key."""

    def do_GET(self) -> None:
        let_in = self.headers.get("Authorization") == f"Bearer {KEY}"
        models = {"data": [{"id": "base", "root": "base", "parent": None, "max_model_len": 64}]}
        self.send_response(200 if let_in else 401)
        self.end_headers()
        self.wfile.write(json.dumps(models if let_in else {"error": "Unauthorized"}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def guarded() -> Iterator[str]:
    """The URL of a server that asks for the key."""
    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_key_is_taken_from_the_environment_and_written_nowhere(
    guarded, tmp_path, monkeypatch, caplog
):
    """vLLM itself: the server of test_serve.py asks for a key."""
    options = {"run_id": "1", "max_tokens": 8, "max_model_len": 64, "vocab_size": 2**31,
               "stop_token_ids": [1], "timeout_s": 20, "start_command": "start"}  # fmt: skip
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RunError, match=r"HTTP 401.*VLLM_API_KEY"):
        VllmSampler([guarded], **options)
    monkeypatch.setenv("VLLM_API_KEY", "another" + KEY)
    with pytest.raises(RunError, match=r"HTTP 401.*VLLM_API_KEY") as error:
        VllmSampler([guarded], **options)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    VllmSampler([guarded], **options)
    write_config(tmp_path, Config(vllm_url=guarded), {})
    assert KEY not in str(error.value) + caplog.text + (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("sign", ["\n", "\r\nX: y", "\u00e9"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(sign, guarded, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_API_KEY", KEY + sign)
    with pytest.raises(RunError, match="VLLM_API_KEY holds a character") as error:
        VllmSampler(
            [guarded], run_id="1", max_tokens=8, max_model_len=64, vocab_size=2**31,
            stop_token_ids=[1], timeout_s=1, start_command="start",
        )  # fmt: skip
    assert KEY not in str(error.value) + caplog.text


@pytest.mark.parametrize("rollout", ["vllm", "jax"])
@pytest.mark.parametrize("other", ["", ",no-address"])
def test_a_password_in_the_address_is_refused_and_not_shown(rollout, other):
    with pytest.raises(InputError, match="VLLM_API_KEY") as error:
        Config(vllm_url=f"http://me:{KEY}@host:x{other}", rollout=rollout)
    assert KEY not in str(error.value)


# -- dependencies -----------------------------------------------------------------------------


def test_the_lock_pins_every_dependency_by_hash_to_a_version_that_pyproject_admits():
    """To make it anew: uv pip compile --generate-hashes --universal --python-version 3.11
    --no-annotate --no-header pyproject.toml -o requirements.lock"""
    lock = (ROOT / "requirements.lock").read_text("utf-8").replace("\\\n", " ")
    pinned: dict[str, list[str]] = {}
    for line in lock.splitlines():
        name, version, hashes = re.fullmatch(
            r"(\S+)==(\S+) (?:; [^\\]*?)?((?: *--hash=sha256:[0-9a-f]{64})+)", line
        ).groups()
        assert hashes
        pinned.setdefault(canonicalize_name(name), []).append(version)
    assert "://" not in lock
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        versions = pinned[canonicalize_name(wanted.name)]
        assert all(wanted.specifier.contains(version) for version in versions), text
