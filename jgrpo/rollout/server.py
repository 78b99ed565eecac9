"""One vLLM server: its base model, the adapter that it samples from, and requests that outlast a
failure.

A policy is a LoRA adapter that the server reads from a folder. Three of its habits shape this file.
Its prefix cache knows an adapter by name and path, so a name is never used twice. It shortens
max_tokens without a word where its context ends, so replies are checked against what was asked
(`replies`). It loses its adapters when it is restarted: ours is loaded again, under a new name.

What fails for a while is asked again, until `timeout_s` have passed since the first failure: a
server that is away, drops a reply or is restarted. A whole reply that is wrong ends the run, as
does another base model.
"""

import asyncio
import logging
import os
import ssl
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import tenacity

from jgrpo.errors import RunError, printable
from jgrpo.rollout.protocol import Completion
from jgrpo.rollout.replies import Body, Retry, json_of, read_completions, words

CERTIFICATE_REMEDY = (
    "If its authority is one of your own, name its certificate: SSL_CERT_FILE=ca.pem (or a folder: "
    "SSL_CERT_DIR), for the trainer's process"
)
ADAPTER_PREFIX = "jgrpo-"
MAX_RELOADS = 10
"""Times that one request may find its adapter gone, and have it loaded again."""
TELL_EVERY_S = 30.0
"""At most as often a server that is waited for is spoken of."""
RETRIED = frozenset({408, 425, 429, *range(500, 600)})
"""Statuses of a server, or of what stands before it, that may be well a moment later."""
log = logging.getLogger(__name__)


class GaveUp(RunError):
    """A server has not answered in the time that it has; another one may."""


class Base(NamedTuple):
    """What a server says of its base model."""

    name: str
    root: Any
    max_model_len: Any


class Policies(NamedTuple):
    """What is sampled from: the adapters in these folders, one a member, as they were when they
    were given out as the `number`th."""

    number: int = 0
    paths: tuple[str, ...] = ()
    """Empty: the base model."""


class Server:
    """A vLLM server as a run uses it, from one event loop. Call `enter` first.

    `trouble` says what its last failure was, and is empty while it answers; `is_left`: others have
    taken over what it was asked for. `loaded` are the policies that it has, and what it calls their
    adapters; those that are `in_use` stay when others are loaded. `outstanding`: the tokens that it
    may still send for what it was asked.
    """

    def __init__(
        self,
        url: str,
        *,
        run_id: str,
        max_model_len: int,
        vocab_size: int,
        timeout_s: float,
        remedy: str,
        in_use: Collection[Policies] = (),
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.trouble, self.is_left = "", False
        self.loaded: dict[Policies, list[str]] = {Policies(): []}
        self._in_use = in_use
        self._run_id = run_id
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._remedy = remedy
        self._told_s = float("-inf")
        self._lock = asyncio.Lock()
        self.outstanding, self._heard_s = 0, time.monotonic()

    async def enter(self, client: httpx.AsyncClient, *, alone: bool) -> None:
        """Read the base model; `alone`: remove what a crashed run left on the server."""
        self._base, names = await self._models(client)
        limit = self._base.max_model_len
        if isinstance(limit, int) and limit < self._max_model_len:
            raise RunError(
                f"{self.url}: the server runs with --max-model-len {limit}; this run needs "
                f"{self._max_model_len} (prompt and completion tokens). {self._remedy}"
            )
        for name in names if alone else ():
            if name.startswith(ADAPTER_PREFIX) and name != self._base.name:
                await self._unload(client, name)
                log.warning("%s: unloaded %s, left by another run (or taken from it: one server "
                            "serves one run)", self.url, printable(name))  # fmt: skip

    async def load(self, client: httpx.AsyncClient, policies: Policies) -> None:
        """Have these adapters, and only then unload those that are not in use. Does nothing if they
        are there."""
        async with self._lock:
            if policies in self.loaded:
                return
            names = await self._load_all(client, policies.paths)
            idle = [other for other in self.loaded if other not in self._in_use]
            previous = [name for other in idle for name in self.loaded.pop(other)]
            self.loaded[policies] = names
            await asyncio.gather(*(self._unload(client, name) for name in previous))

    async def complete(
        self, client: httpx.AsyncClient, body: Body, policies: Policies, member: int
    ) -> list[Completion]:
        """The completions of one prompt, by this member's adapter and no other; it is loaded if the
        server has not got it, or has lost it."""
        for _ in range(1 + MAX_RELOADS):
            await self.load(client, policies)
            asked = {"model": self._name_of(policies, member), **body}
            read = partial(read_completions, asked=asked, vocab_size=self._vocab_size)
            completions = await self._request(client, "/v1/completions", asked, read=read)
            if completions is not None:
                return completions
            async with (
                self._lock
            ):  # many requests find the adapter gone; the first of them loads it
                if self._name_of(policies, member) == asked["model"]:
                    await self._restore(client, policies)
        raise RunError(
            f"{self.url} does not know {asked['model']}, again and again: does it crash, or does "
            "another run use it? One server serves one run. Resume the run when it is well"
        )

    def ask(
        self, client: httpx.AsyncClient, body: Body, policies: Policies, member: int
    ) -> "asyncio.Task[list[Completion]]":
        """`complete` as a task, which counts as outstanding until it ends."""
        tokens = body["n"] * body["max_tokens"]
        if not self.outstanding:
            self._heard_s = time.monotonic()
        self.outstanding += tokens

        def ended(task: "asyncio.Task[list[Completion]]") -> None:
            self.outstanding -= tokens
            if not task.cancelled() and not task.exception():
                self._heard_s = time.monotonic()

        task = asyncio.create_task(self.complete(client, body, policies, member))
        task.add_done_callback(ended)
        return task

    @property
    def silent_s(self) -> float:
        """Seconds for which it has been asked for completions and has sent none."""
        return time.monotonic() - self._heard_s if self.outstanding else 0.0

    async def _restore(self, client: httpx.AsyncClient, policies: Policies) -> None:
        await self._check_base(client)
        if lost := ", ".join(self.loaded[policies]):
            self.loaded[policies] = await self._load_all(client, policies.paths)
            log.warning("%s lost our adapter %s: it was restarted, or another run took it over. "
                        "Loaded again as %s", self.url, lost,
                        ", ".join(self.loaded[policies]))  # fmt: skip

    def _name_of(self, policies: Policies, member: int) -> str:
        """What the server calls a member's policy."""
        return self.loaded[policies][member] if policies.paths else self._base.name

    async def _load_all(self, client: httpx.AsyncClient, paths: Sequence[str]) -> list[str]:
        """Load adapters, at once -> their names, in order."""
        return [*await asyncio.gather(*(self._load(client, path) for path in paths))]

    async def _models(self, client: httpx.AsyncClient) -> tuple[Base, list[str]]:
        """The base model, and the names of all that is served."""
        reply = await self._request(client, "/v1/models", read=json_of)
        try:
            cards = {str(card["id"]): card for card in reply["data"]}
            base = next(card for card in cards.values() if not card.get("parent"))
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise RunError(f"{self.url}/v1/models lists no model: is this a vLLM server?") from None
        return Base(str(base["id"]), base.get("root"), base.get("max_model_len")), list(cards)

    async def _check_base(self, client: httpx.AsyncClient) -> None:
        was, (base, _) = self._base, await self._models(client)
        if base != was:
            raise RunError(
                f"{self.url} has come back with another base model: it was {tuple(was)}, it is "
                f"{tuple(base)} (name, root, --max-model-len). {self._remedy}"
            )

    async def _load(self, client: httpx.AsyncClient, path: str) -> str:
        """Load the adapter under a new name, and return that."""
        name = f"{ADAPTER_PREFIX}{self._run_id}-{Path(path).name}-{uuid.uuid4().hex[:8]}"
        body = {"lora_name": name, "lora_path": path, "load_inplace": False}
        ask = partial(self._request, client, "/v1/load_lora_adapter", body, retried=RETRIED - {500})
        response = await ask()
        if response.status_code == 500:  # an adapter that it cannot use, or an engine that died:
            await self._request(client, "/health")  # once that is well, ask again
            response = await ask()
        if response.status_code == 404 and "error" not in response.text:
            raise RunError(
                f"{response.url}: no such route: the server runs without --enable-lora or without "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. {self._remedy}"
            )
        # Names are unique: if ours is there already, an earlier try's answer was lost.
        if not response.is_success and "already been loaded" not in response.text:
            raise RunError(
                f"{self.url} cannot load the adapter {path}: HTTP {response.status_code}: "
                f"{words(response)}\nThe server must see that folder, and run with --enable-lora "
                f"and a --max-lora-rank that is large enough. {self._remedy}"
            )
        await self._check_base(client)  # after it: a restart from now on loses the adapter
        return name

    async def _unload(self, client: httpx.AsyncClient, name: str) -> None:
        response = await self._request(client, "/v1/unload_lora_adapter", {"lora_name": name})
        if not response.is_success and response.status_code != 404:  # 404: gone already
            raise RunError(f"{self.url}: cannot unload {name}: {words(response)}")

    async def _request(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: Body | None = None,
        *,
        retried: Collection[int] = RETRIED,
        read: Callable[[httpx.Response], Any] = lambda response: response,
    ) -> Any:
        """POST body (GET without one) -> what `read` makes of the answer. Try again after transport
        errors, after `retried` statuses, and where `read` raises Retry."""
        now = asyncio.get_running_loop().time
        trouble, failed_s = "", 0.0

        def note(state: tenacity.RetryCallState) -> None:
            nonlocal trouble, failed_s
            error = state.outcome and state.outcome.exception()
            self.trouble = trouble = str(error) or type(error).__name__
            failed_s = failed_s or now()
            limit.reschedule(failed_s + self.timeout_s)
            if now() - self._told_s >= TELL_EVERY_S:
                self._told_s = now()
                left_s = max(0.0, failed_s + self.timeout_s - now())
                log.warning("%s%s: %s; still trying, for %.3g s more. %s",
                            self.url, path, trouble, left_s, self._remedy)  # fmt: skip

        async def once() -> Any:
            nonlocal trouble
            trouble = "no answer"
            limit.reschedule(now() + self.timeout_s)
            method = "GET" if body is None else "POST"
            try:
                response = await client.request(method, self.url + path, json=body)
            except httpx.ConnectError as error:
                if remedy := _tls_remedy(str(error)):  # it will not be better the next time
                    raise RunError(f"{self.url}: {error}. {remedy}") from error
                raise
            if response.status_code in retried:
                raise Retry(f"HTTP {response.status_code}: {words(response)}")
            answer = read(response)
            self.trouble, self.is_left = "", False
            return answer

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((httpx.RequestError, Retry)),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            before_sleep=note,
        )
        try:
            async with asyncio.timeout(None) as limit:
                return await tries(once)
        except TimeoutError:
            self.trouble = trouble
            raise GaveUp(
                f"{self.url}{path}: {trouble}; gave up after {self.timeout_s:g} s. If the server "
                "is only slow, raise vllm_timeout_s; if it failed, look into its log. "
                f"{self._remedy}"
            ) from None


def open_client() -> httpx.AsyncClient:
    """Speaks to any number of servers at once; the key is that of VLLM_API_KEY."""
    # trust_env=False: a proxy from the environment must not come between us and localhost.
    made = httpx.AsyncClient(
        limits=httpx.Limits(max_connections=None),
        timeout=httpx.Timeout(None, connect=10.0),
        trust_env=False,
        verify=_authorities(),
    )
    if key := os.environ.get("VLLM_API_KEY"):  # no option: config.json would keep it
        if not (key.isascii() and key.isprintable()):  # an error of httpx would show it
            raise RunError("VLLM_API_KEY holds a character that an HTTP header cannot")
        made.headers["Authorization"] = f"Bearer {key}"
    return made


def _tls_remedy(error: str) -> str:
    """What would help where a server's certificate, or its want of one, ends the handshake; empty
    for other errors."""
    if "Hostname mismatch" in error or "IP address mismatch" in error:
        return "Name the server as its certificate does"
    if "CERTIFICATE_VERIFY_FAILED" in error:
        return CERTIFICATE_REMEDY
    if "WRONG_VERSION_NUMBER" in error or "RECORD_LAYER_FAILURE" in error:
        return "It does not speak TLS: take http:// in place of https://"
    return ""


def _authorities() -> ssl.SSLContext:
    """Who vouches for a server: the usual authorities, and those of SSL_CERT_FILE, SSL_CERT_DIR."""
    context = httpx.create_ssl_context(trust_env=False)
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if folder and not os.path.isdir(folder):  # OpenSSL would not say so
        raise RunError(f"SSL_CERT_DIR={folder}: no such folder")
    try:
        if file or folder:
            context.load_verify_locations(file or None, folder or None)
    except OSError as error:
        raise RunError(f"SSL_CERT_FILE={file}: {error}; it needs certificates in PEM") from error
    return context
