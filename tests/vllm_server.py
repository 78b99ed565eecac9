"""Servers for tests: a real vLLM, started by jgrpo.serve's own command on a free port, and a small
one that answers like vLLM and fails on demand.
"""

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from ports import free_port, is_free

from jgrpo.config import Config
from jgrpo.serve import command, environment, runs_on_cpu

SMALL = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the models are small, and other tests run beside
}
"""What a server of tests finds in its environment (`environ`), unless something else is there."""


@contextlib.contextmanager
def vllm_server(
    model: Path,
    log_file: Path,
    *,
    extra: Sequence[str] = (),
    timeout_s: float = 300,
    url: str = "",
    max_loras: int = 1,
    head_dtype: str = "",
    environ: Mapping[str, str] = SMALL,
    **fields: Any,
) -> Iterator[str]:
    """Yield the URL of a server for the model folder; stop it and its children afterwards.

    `fields` are those of Config (lora_r=4, max_tokens=64, ...), dtype is float32 unless given;
    `max_loras` and `head_dtype` are those of serve; `extra` goes to vLLM; `url`, if given, is that
    of a server that was there before. Raises RuntimeError with the end of the log if it does not
    come up.
    """
    url = url or f"http://127.0.0.1:{free_port()}"
    config = Config(**{"model_id": str(model), "dtype": "float32", "vllm_url": url, **fields})
    cpu = runs_on_cpu()
    inherited = {**environ, **os.environ}
    with log_file.open("w") as log:
        server = subprocess.Popen(
            [*command(config, cpu=cpu, max_loras=max_loras, head_dtype=head_dtype), *extra],
            env={**inherited, **environment(inherited, cpu=cpu)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for_health(url, server, log_file, time.monotonic() + timeout_s)
        yield url
    finally:
        _stop(server)


@contextlib.contextmanager
def fleet_server(config: Config, log_file: Path, devices: str = "0,1") -> Iterator[list[str]]:
    """Yield the URLs that `jgrpo.serve --devices` prints once all servers are well; then end it as
    Ctrl-C does."""
    port = next(p for p in range(free_port(), 65_000) if is_free(p) and is_free(p + 1))
    fields = "model_id", "dtype", "lora_r", "max_tokens", "max_prompt_tokens"
    flags = [word for f in fields for word in (f"--{f}", str(getattr(config, f)))]
    with log_file.open("w") as log:
        serve = subprocess.Popen(
            [sys.executable, "-m", "jgrpo.serve", *flags, "--devices", devices,
             "--vllm_url", f"http://127.0.0.1:{port}"],
            env={**SMALL, **os.environ}, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        assert serve.stdout
        said = serve.stdout.readline().split()
        assert said[:1] == ["--vllm_url"], log_file.read_text()[-3000:]
        yield said[1].split(",")
    finally:
        serve.send_signal(signal.SIGINT)
        serve.wait(timeout=60)


def _wait_for_health(url: str, server: subprocess.Popen, log_file: Path, deadline: float) -> None:
    with httpx.Client(trust_env=False, timeout=5) as client:
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/health").status_code == 200:
                    return
            time.sleep(0.5)
    tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM did not come up (exit status {server.poll()}); its log ends:\n{tail}")


def _stop(server: subprocess.Popen) -> None:
    """Ask the whole process group to end, insist after 15 s, and wait for it to be gone."""
    for wish, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, wish)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=patience_s)
            if _group_is_gone(server.pid, patience_s):
                return


def _group_is_gone(group: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


END = 1
Reply = tuple[int, Any]
"""Status and body (JSON, or raw bytes)."""
DROP, CUT = 0, -1
"""In place of a status: drop the connection without an answer, or in the middle of the body."""
UNKNOWN = {"error": {"message": "The model does not exist."}}


def good_choice(asked: dict, g: int) -> dict:
    """Completion g: tokens that tell its prompt and seed, then the end token."""
    ids = [asked["prompt"][0], 100 + asked["seed"] + g, END]
    return {
        "index": g,
        "token_ids": ids,
        "prompt_token_ids": asked["prompt"],
        "logprobs": {"token_logprobs": [-0.5, -1.5, -2.5]},
        "finish_reason": "stop",
    }


class FakeVllm:
    """Answers like vLLM; `faults[path]` is a list of replies to be given first, None for a good
    one; `change` edits the choices of a good reply."""

    def __init__(self) -> None:
        self.faults: dict[str, list[Reply | None]] = {}
        self.change: Callable[[list[dict]], Any] = lambda choices: choices
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, dict]] = []
        self.base = {"id": "base", "parent": None, "root": "models/base", "max_model_len": 64}
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict) -> Reply:
        with self.lock:
            self.calls.append((path, body))
            fault = self.faults[path].pop(0) if self.faults.get(path) else None
        return fault or getattr(self, path.rsplit("/", 1)[1])(body)

    def models(self, _: dict) -> Reply:
        adapters = [{"id": name, "parent": self.base["id"]} for name in self.adapters]
        return 200, {"data": [self.base, *adapters]}

    def health(self, _: dict) -> Reply:
        return 200, b""

    def load_lora_adapter(self, body: dict) -> Reply:
        name = body["lora_name"]
        if name in self.adapters:
            return 400, {"error": {"message": f"'{name}' has already been loaded."}}
        self.adapters[name] = body["lora_path"]
        return 200, "Success"

    def unload_lora_adapter(self, body: dict) -> Reply:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": "cannot be found."}}
        return 200, "Success"

    def completions(self, body: dict) -> Reply:
        if body["model"] not in (self.base["id"], *self.adapters):
            return 404, UNKNOWN
        # Prompt 10 is answered last, prompt 17 first: replies come in the opposite order.
        time.sleep(max(0, 17 - body["prompt"][0]) * 0.01)
        choices = [good_choice(body, g) for g in range(body["n"])]
        return 200, {"model": body["model"], "choices": self.change(choices)}

    def bodies(self, path: str) -> list[dict]:
        return [body for called, body in self.calls if called == path]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the default of 5, a burst of connections waits a second

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error: what was overtaken is not waited for."""
        if not isinstance(sys.exception(), ConnectionError | ssl.SSLError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def listening(fake: FakeVllm, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Yield the URL at which `fake` answers; with `tls`, in https."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            status, reply = fake.answer(self.path, json.loads(self.rfile.read(size) or b"{}"))
            self.close_connection = status in (DROP, CUT)
            if status == DROP:
                return
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(200 if status == CUT else status)
            if data.startswith(b"{"):
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if status == CUT else data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    if tls:  # the handshake in the request's own thread
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    scheme = "https://localhost" if tls else "http://127.0.0.1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"{scheme}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
