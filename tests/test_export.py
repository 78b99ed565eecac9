"""jgrpo.export: a merge equals PEFT's, and what reaches the hub is whole, with a true card.

The hub is a stand-in on this machine that speaks as much of its HTTP interface as one commit needs.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import adapted, merged, random_ids, torch_logits, torch_model
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import tiny_config

import jgrpo
from jgrpo.errors import InputError
from jgrpo.export import Options, export
from jgrpo.run.rundir import json_line, write_config

IDS = random_ids(2, 9)
TOKEN = "hf_notArealToken"


def make_adapter(base: Path, folder: Path) -> Path:
    jgrpo.save_adapter(merged(*adapted(base, 2)), folder)
    return folder


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("qwen3-tied")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "a")


@pytest.mark.parametrize(
    "kind", ["qwen3-tied", pytest.param("qwen3-untied", marks=pytest.mark.slow)]
)
def test_a_merge_equals_pefts_and_is_rounded_once(kind, checkpoint, tmp_path):
    base = checkpoint(kind)
    adapter = make_adapter(base, tmp_path / "adapter")
    export(Options(adapter, merge=tmp_path / "f32", dtype="float32"))
    export(Options(adapter, merge=tmp_path / "bf16"))
    reference = PeftModel.from_pretrained(torch_model(base), adapter).merge_and_unload()
    wanted = torch_logits(reference, IDS)
    assert np.abs(wanted - torch_logits(torch_model(base), IDS)).max() > 1
    assert np.abs(torch_logits(torch_model(tmp_path / "f32"), IDS) - wanted).max() < 1e-4
    exact = load_file(tmp_path / "f32" / "model.safetensors")
    rounded = load_file(tmp_path / "bf16" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name
    assert np.abs(jgrpo.load_model(str(tmp_path / "f32"))(IDS) - wanted).max() < 1e-4


def test_what_cannot_be_exported_is_told(adapter, tmp_path):
    with pytest.raises(InputError, match="nothing to do"):
        export(Options(adapter))
    with pytest.raises(InputError, match="exists already"):
        export(Options(adapter, merge=tmp_path))
    with pytest.raises(InputError, match="--base"):
        export(Options(adapter, push_to_hub="me/x"))
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        export(Options(tmp_path, merge=tmp_path / "out"))


class Hub(BaseHTTPRequestHandler):
    """Takes one commit: repos/create, preupload (all small), commit."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.asked.append((self.path, self.headers.get("Authorization")))
        if server.refuses:
            return self.answer(403, {"error": "no"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            plain = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False,
                      "oid": None} for f in files]  # fmt: skip
            return self.answer(200, {"files": plain})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://127.0.0.1:{server.server_port}/me/x"
            return self.answer(200, {"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40,
                                     "success": True})  # fmt: skip
        return self.answer(200, {"url": f"http://127.0.0.1:{server.server_port}/me/x"})

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.refuses = [], {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(adapter, tmp_path):
    """A run folder with what a card is written from."""
    folder = tmp_path / "run"
    (folder / "adapters").mkdir(parents=True)
    (folder / "adapters" / "step_000003").symlink_to(adapter)
    write_config(folder, tiny_config(tmp_path, model_id="Some/Base", lr=0.0123), {})
    lines = [{"step": 0, "eval/accuracy": 0.25}, {"step": 3, "eval/accuracy": 0.75}]
    (folder / "metrics.jsonl").write_text("".join(map(json_line, lines)))
    rows = [{"adapter": "a", "step": 3, "eval_set": "gsm8k", "index": i, "correct": i < 30}
            for i in range(40)]  # fmt: skip
    (folder / "eval.jsonl").write_text("".join(map(json_line, rows)))
    return folder


def command(run: Path, hub, *more: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN,
                        "HF_HUB_OFFLINE": "0"}  # fmt: skip
    argv = ["-m", "jgrpo.export", str(run), "--push_to_hub", "me/x", "--base", "Some/Base", *more]
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env,
                          cwd=Path(__file__).parent.parent)  # fmt: skip


@pytest.mark.slow
def test_an_adapter_goes_to_the_hub_with_a_card_of_its_run(run, hub, base, tmp_path):
    done = command(run, hub)
    assert done.returncode == 0, done.stderr
    assert f"Bearer {TOKEN}" in {token for _, token in hub.asked}
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert not any(TOKEN.encode() in content for content in hub.files.values())
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in hub.files.items():
        (arrived / name).write_bytes(content)
    config = json.loads((arrived / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Some/Base"
    own = PeftModel.from_pretrained(torch_model(base), run / "adapters" / "step_000003")
    theirs = PeftModel.from_pretrained(torch_model(base), arrived)
    assert np.array_equal(torch_logits(own, IDS), torch_logits(theirs, IDS))
    card = hub.files["README.md"].decode()
    assert "base_model: Some/Base" in card
    assert "| step 3 | gsm8k | 40 | 1 | 75.0 [59" in card  # Wilson's interval of 30 of 40
    assert "| 3 | 0.750 |" in card
    assert "| `lr` | `0.0123` |" in card
    assert "AutoPeftModelForCausalLM" in card
    assert "vllm serve Some/Base --enable-lora" in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_a_dry_run_sends_nothing(run, hub):
    done = command(run, hub, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "would send to me/x: README.md, adapter_config.json" in done.stdout
    assert hub.asked == []


@pytest.mark.slow
def test_a_hub_that_refuses_ends_it_in_one_message(run, hub):
    hub.refuses = True
    done = command(run, hub)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert TOKEN not in done.stderr
