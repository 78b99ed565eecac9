"""A running vLLM server as the sampler: token ids in, the sampled ids and their logprobs out.

The server holds the base model; a policy is a LoRA adapter that it reads from a folder. Three of
its habits shape this file. Its prefix cache knows an adapter by name and path, so a name is never
used twice. It fills options that a request leaves open from the model's generation_config.json,
so every option is sent. It shortens max_tokens without a word where its context ends, so replies
are checked against what was asked. Ids go both ways, so its tokenizer and its chat template cannot
matter. Left out on purpose: streaming, text, chat.

What fails for a while is asked again: a server that is away, drops a reply or is restarted (which
loses its adapters: ours is loaded again, under a new name). A whole reply that is wrong ends the
run, as does another base model.
"""

import asyncio
import logging
import os
import ssl
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import tenacity

from jgrpo.errors import RunError, printable
from jgrpo.rollout.protocol import Completion, Progress
from jgrpo.rollout.replies import Body, Retry, json_of, read_completions, words

T = TypeVar("T")
CERTIFICATE_REMEDY = (
    "If its authority is one of your own, name its certificate: SSL_CERT_FILE=ca.pem (or a folder: "
    "SSL_CERT_DIR), for the trainer's process"
)
Action = Callable[[httpx.AsyncClient, str], Coroutine[Any, Any, T]]
"""Something done to the server at a URL."""
ADAPTER_PREFIX = "jgrpo-"
MAX_IN_FLIGHT = 256
"""Requests that one server gets at once: more than its batch holds, fewer than 1024 sockets."""
MAX_RELOADS = 10
"""Times that one request may find its adapter gone, and have it loaded again."""
TELL_EVERY_S = 30.0
"""At most as often a server that is waited for is spoken of."""
RETRIED = frozenset({408, 425, 429, *range(500, 600)})
"""Statuses of a server, or of what stands before it, that may be well a moment later."""
THE_POLICY_ITSELF = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "stop": [],
    "ignore_eos": True,  # stop_token_ids alone decide
    "logprobs": 0,  # of the sampled token, and no others
    "return_token_ids": True,
    "stream": False,
}
log = logging.getLogger(__name__)


class Base(NamedTuple):
    """What a server says of its base model."""

    name: str
    root: Any
    max_model_len: Any


class VllmSampler:
    """Samples from one or more vLLM servers (rollout.Sampler); the base model until load().

    Several servers share the prompts in turn, and each gets every adapter; they must see the run
    folder under the same path. One try of a request may take timeout_s, and so may the wait for a
    server that is away, from its first failure on. Stopping is decided by `stop_token_ids` alone:
    the server's own end tokens are ignored. `max_model_len` is the prompt and completion tokens
    that the server must hold.

    Raises RunError, with what was wrong and how to start the server. Not for use inside a running
    event loop. One run a server: adapters of others that carry our prefix are unloaded at start,
    unless `alone` is false (to evaluate beside a run).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        run_id: str,
        max_tokens: int,
        max_model_len: int,
        vocab_size: int,
        stop_token_ids: Sequence[int],
        timeout_s: float,
        start_command: str,
        alone: bool = True,
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._run_id = run_id
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)
        self._timeout_s = timeout_s
        self._remedy = f"Start the server with\n  {start_command}"
        self._alone = alone
        self._told_s: dict[str, float] = {}
        self._path = ""
        self._adapters: dict[str, str] = {}  # its name on each server; they differ after a restart
        self._bases = dict(zip(self._urls, self._on_each(self._enter), strict=True))

    def load(self, folder: Path) -> None:
        """Load the adapter in `folder` into every server, then unload the previous one.

        Comes back when all servers sample from the new one; only then may the previous one's
        folder be removed (removing the folder of a loaded adapter kills the server). The new one's
        must stay: a server that is restarted needs it again.
        """
        path = str(Path(folder).absolute())
        names = self._on_each(lambda client, url: self._load(client, url, path))
        previous, self._adapters = self._adapters, dict(zip(self._urls, names, strict=True))
        self._path = path
        self._unload_everywhere(previous)

    def unload(self) -> None:
        """Unload the adapter: the base model is sampled from now on."""
        previous, self._adapters = self._adapters, {}
        self._unload_everywhere(previous)

    def close(self) -> None:
        """Unload the adapter if the servers are still there; warns, and never raises, if not."""
        self._timeout_s = min(self._timeout_s, 10.0)
        try:
            self.unload()
        except RunError as error:
            log.warning("adapter not unloaded: %s", error)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        group_size: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of each prompt: result[p][g] belongs to prompts[p].

        The server gives completion g of prompt p the seed seeds[p] + g: seeds that are less than
        group_size apart share their noise, so spread them (hash run, step and prompt).
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        n = group_size if temperature > 0 else 1  # vLLM refuses n > 1 if all would be equal
        slots = {url: asyncio.Semaphore(MAX_IN_FLIGHT) for url in self._urls}
        locks = {url: asyncio.Lock() for url in self._urls}

        async def group(client: httpx.AsyncClient, p: int) -> list[Completion]:
            url = self._urls[p % len(self._urls)]
            body = {
                "prompt": [int(token) for token in prompts[p]],
                "n": n,
                "seed": int(seeds[p]),
                "max_tokens": max_tokens or self._max_tokens,
                "temperature": temperature,
                "stop_token_ids": self._stop_token_ids,
                **THE_POLICY_ITSELF,
                "top_p": top_p,
            }
            async with slots[url]:
                completions = await self._complete(client, url, body, locks[url])
            completions *= group_size // n
            if progress:
                progress(len(completions), sum(len(c.token_ids) for c in completions))
            return completions

        return _run(lambda client: (group(client, p) for p in range(len(prompts))))

    async def _complete(
        self, client: httpx.AsyncClient, url: str, body: Body, lock: asyncio.Lock
    ) -> list[Completion]:
        """The completions of one prompt, by the adapter and no other; loads it again if lost."""
        for _ in range(1 + MAX_RELOADS):
            asked = {"model": self._adapters.get(url, self._bases[url].name), **body}
            read = partial(read_completions, asked=asked, vocab_size=self._vocab_size)
            completions = await self._request(client, url, "/v1/completions", asked, read=read)
            if completions is not None:
                return completions
            async with lock:  # many requests find the adapter gone; the first of them loads it
                if self._adapters.get(url, asked["model"]) == asked["model"]:
                    await self._restore(client, url, asked["model"])
        raise RunError(
            f"{url} does not know {asked['model']}, again and again: does it crash, or does "
            "another run use it? One server serves one run. Resume the run when it is well"
        )

    async def _restore(self, client: httpx.AsyncClient, url: str, lost: str) -> None:
        await self._check_base(client, url)
        if url in self._adapters:
            self._adapters[url] = await self._load(client, url, self._path)
            log.warning("%s lost our adapter %s: it was restarted, or another run took it over. "
                        "Loaded again as %s", url, lost, self._adapters[url])  # fmt: skip

    async def _models(self, client: httpx.AsyncClient, url: str) -> tuple[Base, list[str]]:
        """The base model, and the names of all that is served."""
        reply = await self._request(client, url, "/v1/models", read=json_of)
        try:
            cards = {str(card["id"]): card for card in reply["data"]}
            base = next(card for card in cards.values() if not card.get("parent"))
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise RunError(f"{url}/v1/models lists no model: is this a vLLM server?") from None
        return Base(str(base["id"]), base.get("root"), base.get("max_model_len")), list(cards)

    async def _enter(self, client: httpx.AsyncClient, url: str) -> Base:
        """Remove what a crashed run left on the server; return its base model."""
        base, names = await self._models(client, url)
        limit = base.max_model_len
        if isinstance(limit, int) and limit < self._max_model_len:
            raise RunError(
                f"{url}: the server runs with --max-model-len {limit}; this run needs "
                f"{self._max_model_len} (prompt and completion tokens). {self._remedy}"
            )
        for name in names if self._alone else ():
            if name.startswith(ADAPTER_PREFIX) and name != base.name:
                await self._unload(client, url, name)
                log.warning("%s: unloaded %s, left by another run (or taken from it: one server "
                            "serves one run)", url, printable(name))  # fmt: skip
        return base

    async def _check_base(self, client: httpx.AsyncClient, url: str) -> None:
        was, (base, _) = self._bases[url], await self._models(client, url)
        if base != was:
            raise RunError(
                f"{url} has come back with another base model: it was {tuple(was)}, it is "
                f"{tuple(base)} (name, root, --max-model-len). {self._remedy}"
            )

    async def _load(self, client: httpx.AsyncClient, url: str, path: str) -> str:
        """Load the adapter under a new name, and return that."""
        name = f"{ADAPTER_PREFIX}{self._run_id}-{Path(path).name}-{uuid.uuid4().hex[:8]}"
        body = {"lora_name": name, "lora_path": path, "load_inplace": False}
        ask = partial(
            self._request, client, url, "/v1/load_lora_adapter", body, retried=RETRIED - {500}
        )
        response = await ask()
        if response.status_code == 500:  # an adapter that it cannot use, or an engine that died:
            await self._request(client, url, "/health")  # once that is well, ask again
            response = await ask()
        if response.status_code == 404 and "error" not in response.text:
            raise RunError(
                f"{response.url}: no such route: the server runs without --enable-lora or without "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. {self._remedy}"
            )
        # Names are unique: if ours is there already, an earlier try's answer was lost.
        if not response.is_success and "already been loaded" not in response.text:
            raise RunError(
                f"{url} cannot load the adapter {path}: HTTP {response.status_code}: "
                f"{words(response)}\nThe server must see that folder, and run with --enable-lora "
                f"and a --max-lora-rank that is large enough. {self._remedy}"
            )
        await self._check_base(client, url)  # after it: a restart from now on loses the adapter
        return name

    async def _unload(self, client: httpx.AsyncClient, url: str, name: str) -> None:
        body = {"lora_name": name}
        response = await self._request(client, url, "/v1/unload_lora_adapter", body)
        if not response.is_success and response.status_code != 404:  # 404: gone already
            raise RunError(f"{url}: cannot unload {name}: {words(response)}")

    def _unload_everywhere(self, names: dict[str, str]) -> None:
        if names:
            self._on_each(lambda client, url: self._unload(client, url, names[url]))

    def _on_each(self, action: Action[T]) -> list[T]:
        return _run(lambda client: (action(client, url) for url in self._urls))

    async def _request(
        self,
        client: httpx.AsyncClient,
        url: str,
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
            trouble = str(error) or type(error).__name__
            failed_s = failed_s or now()
            limit.reschedule(failed_s + self._timeout_s)
            if now() - self._told_s.get(url, float("-inf")) >= TELL_EVERY_S:
                self._told_s[url] = now()
                left_s = max(0.0, failed_s + self._timeout_s - now())
                log.warning("%s%s: %s; still trying, for %.3g s more. %s",
                            url, path, trouble, left_s, self._remedy)  # fmt: skip

        async def once() -> Any:
            nonlocal trouble
            trouble = "no answer"
            limit.reschedule(now() + self._timeout_s)
            method = "GET" if body is None else "POST"
            try:
                response = await client.request(method, url + path, json=body)
            except httpx.ConnectError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):  # it will not become a good one
                    raise RunError(f"{url}: {error}. {CERTIFICATE_REMEDY}") from error
                raise
            if response.status_code in retried:
                raise Retry(f"HTTP {response.status_code}: {words(response)}")
            return read(response)

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((httpx.RequestError, Retry)),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            before_sleep=note,
        )
        try:
            async with asyncio.timeout(None) as limit:
                return await tries(once)
        except TimeoutError:
            raise RunError(
                f"{url}{path}: {trouble}; gave up after {self._timeout_s:g} s. If the server is "
                f"only slow, raise vllm_timeout_s; if it failed, look into its log. {self._remedy}"
            ) from None


def _authorities() -> ssl.SSLContext:
    """Who vouches for a server: the usual authorities, and those of SSL_CERT_FILE, SSL_CERT_DIR."""
    context = httpx.create_ssl_context(trust_env=False)
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    try:
        if file or folder:
            context.load_verify_locations(file or None, folder or None)
    except OSError as error:
        raise RunError(f"SSL_CERT_FILE={file}, SSL_CERT_DIR={folder}: {error}") from error
    return context


def _run(work: Callable[[httpx.AsyncClient], Iterable[Coroutine[Any, Any, T]]]) -> list[T]:
    """Run all of `work` at once; the first failure cancels the rest and is raised as it is."""

    async def main() -> list[T]:
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(None, connect=10.0)
        # trust_env=False: a proxy from the environment must not come between us and localhost.
        async with httpx.AsyncClient(
            limits=limits, timeout=timeout, trust_env=False, verify=_authorities()
        ) as client:
            if key := os.environ.get("VLLM_API_KEY"):  # no option: config.json would keep it
                if not (key.isascii() and key.isprintable()):  # an error of httpx would show it
                    raise RunError("VLLM_API_KEY holds a character that an HTTP header cannot")
                client.headers["Authorization"] = f"Bearer {key}"
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(coroutine) for coroutine in work(client)]
            return [task.result() for task in tasks]

    try:
        return asyncio.run(main())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
