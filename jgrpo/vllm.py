"""A running vLLM server as the sampler: token ids in, the sampled ids and their logprobs out.

The server holds the base model; a policy is a LoRA adapter that it reads from a folder. Three of
its habits shape this file. Its prefix cache knows an adapter by name and path, so a name is never
used twice. It fills options that a request leaves open from the model's generation_config.json,
so every option is sent. It shortens max_tokens without a word where its context ends, so replies
are checked against what was asked. Left out on purpose: streaming, text, chat.
"""

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import tenacity

from jgrpo.errors import RunError
from jgrpo.rollout import Completion, Progress

T = TypeVar("T")
Body = dict[str, Any]
Action = Callable[[httpx.AsyncClient, str], Coroutine[Any, Any, T]]
"""Something done to the server at a URL."""
ADAPTER_PREFIX = "jgrpo-"
MAX_IN_FLIGHT = 256
"""Requests that one server gets at once: more than its batch holds, fewer than 1024 sockets."""
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


class VllmSampler:
    """Samples from one or more vLLM servers (rollout.Sampler); the base model until load().

    Several servers share the prompts in turn, and each gets every adapter; they must see the run
    folder under the same path. A server that is away is waited for, up to timeout_s a request,
    retries included. Stopping is decided by `stop_token_ids` alone: the server's own end tokens
    are ignored. `max_model_len` is the prompt and completion tokens that the server must hold.

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
        stop_token_ids: Sequence[int],
        timeout_s: float,
        start_command: str,
        alone: bool = True,
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._run_id = run_id
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._stop_token_ids = list(stop_token_ids)
        self._timeout_s = timeout_s
        self._remedy = f"Start the server with\n  {start_command}"
        self._alone = alone
        self._away: set[str] = set()
        self._adapter: str | None = None
        self._base_models = dict(zip(self._urls, self._on_each(self._enter), strict=True))

    def load(self, folder: Path) -> None:
        """Load the adapter in `folder` into every server, then unload the previous one.

        Comes back when all servers sample from the new one; only then may the previous one's
        folder be removed (removing the folder of a loaded adapter kills the server).
        """
        path = str(Path(folder).absolute())
        name = f"{ADAPTER_PREFIX}{self._run_id}-{Path(path).name}-{uuid.uuid4().hex[:8]}"
        self._on_each(lambda client, url: self._load(client, url, name, path))
        previous, self._adapter = self._adapter, name
        self._unload_everywhere(previous)

    def unload(self) -> None:
        """Unload the adapter: the base model is sampled from now on."""
        previous, self._adapter = self._adapter, None
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

        async def group(client: httpx.AsyncClient, p: int) -> list[Completion]:
            url = self._urls[p % len(self._urls)]
            body = {
                "model": self._adapter or self._base_models[url],
                "prompt": [int(token) for token in prompts[p]],
                "n": n,
                "seed": int(seeds[p]),
                "max_tokens": max_tokens or self._max_tokens,
                "temperature": temperature,
                "stop_token_ids": self._stop_token_ids,
                **THE_POLICY_ITSELF,
            }
            async with slots[url]:
                completions = (await self._complete(client, url, body)) * (group_size // n)
            if progress:
                progress(len(completions), sum(len(c.token_ids) for c in completions))
            return completions

        return _run(lambda client: (group(client, p) for p in range(len(prompts))))

    async def _complete(self, client: httpx.AsyncClient, url: str, body: Body) -> list[Completion]:
        response = await self._request(client, f"{url}/v1/completions", body)
        if response.status_code == 404 and body["model"] == self._adapter:
            raise RunError(
                f"{url} no longer knows the adapter {self._adapter} ({_words(response)}): the "
                "server was restarted, or another run took it over. Resume the run."
            )
        try:
            return _completions(_reply(response), body)
        except ValueError as error:
            raise RunError(f"{url}/v1/completions: bad reply: {error}") from None

    async def _enter(self, client: httpx.AsyncClient, url: str) -> str:
        """Remove what a crashed run left on the server; return the base model's served name."""
        reply = _reply(await self._request(client, f"{url}/v1/models"))
        try:
            cards = {str(card["id"]): card for card in reply["data"]}
            base = next(name for name, card in cards.items() if not card.get("parent"))
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise RunError(f"{url}/v1/models lists no model: is this a vLLM server?") from None
        limit = cards[base].get("max_model_len")
        if isinstance(limit, int) and limit < self._max_model_len:
            raise RunError(
                f"{url}: the server runs with --max-model-len {limit}; this run needs "
                f"{self._max_model_len} (prompt and completion tokens). {self._remedy}"
            )
        for name in cards if self._alone else ():
            if name.startswith(ADAPTER_PREFIX) and name != base:
                await self._unload(client, url, name)
                log.warning("%s: unloaded %s, left by another run (or taken from it: one server "
                            "serves one run)", url, name)  # fmt: skip
        return base

    async def _load(self, client: httpx.AsyncClient, url: str, name: str, path: str) -> None:
        address = f"{url}/v1/load_lora_adapter"
        body = {"lora_name": name, "lora_path": path, "load_inplace": False}
        # 500 is vLLM's answer to an adapter that it cannot use: trying again would not help.
        response = await self._request(client, address, body, retried=(502, 503, 504))
        if response.status_code == 404 and "error" not in response.text:
            raise RunError(
                f"{address}: no such route: the server runs without --enable-lora or without "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. {self._remedy}"
            )
        if "already been loaded" in response.text:
            return  # names are unique, so an earlier try got through and its answer was lost
        if not response.is_success:
            raise RunError(
                f"{url} cannot load the adapter {path}: HTTP {response.status_code}: "
                f"{_words(response)}\nThe server must see that folder, and run with --enable-lora "
                f"and a --max-lora-rank that is large enough. {self._remedy}"
            )

    async def _unload(self, client: httpx.AsyncClient, url: str, name: str) -> None:
        body = {"lora_name": name}
        response = await self._request(client, f"{url}/v1/unload_lora_adapter", body)
        if not response.is_success and response.status_code != 404:  # 404: gone already
            raise RunError(f"{url}: cannot unload {name}: {_words(response)}")

    def _unload_everywhere(self, name: str | None) -> None:
        if name is not None:
            self._on_each(lambda client, url: self._unload(client, url, name))

    def _on_each(self, action: Action[T]) -> list[T]:
        return _run(lambda client: (action(client, url) for url in self._urls))

    async def _request(
        self,
        client: httpx.AsyncClient,
        url: str,
        body: Body | None = None,
        *,
        retried: Sequence[int] = range(500, 600),
    ) -> httpx.Response:
        """POST body (GET without one); try again after transport errors and `retried` statuses."""
        trouble = "no answer"

        def note(state: tenacity.RetryCallState) -> None:
            nonlocal trouble
            error = state.outcome and state.outcome.exception()
            trouble = str(error) or type(error).__name__
            if url not in self._away:
                self._away.add(url)
                log.warning("%s: %s; still trying. %s", url, trouble, self._remedy)

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((httpx.TransportError, _Retry)),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            before_sleep=note,
        )

        async def once() -> httpx.Response:
            response = await client.request("GET" if body is None else "POST", url, json=body)
            if response.status_code in retried:
                raise _Retry(f"HTTP {response.status_code}: {_words(response)}")
            return response

        try:
            async with asyncio.timeout(self._timeout_s):
                response: httpx.Response = await tries(once)
        except TimeoutError:
            raise RunError(
                f"{url}: {trouble}; gave up after {self._timeout_s:g} s. If the server is only "
                f"slow, raise vllm_timeout_s; if it failed, look into its log. {self._remedy}"
            ) from None
        self._away.discard(url)
        return response


class _Retry(Exception):
    """An answer that may be another one next time."""


def _run(work: Callable[[httpx.AsyncClient], Iterable[Coroutine[Any, Any, T]]]) -> list[T]:
    """Run all of `work` at once; the first failure cancels the rest and is raised as it is."""

    async def main() -> list[T]:
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(None, connect=10.0)
        # trust_env=False: a proxy from the environment must not come between us and localhost.
        async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(coroutine) for coroutine in work(client)]
            return [task.result() for task in tasks]

    try:
        return asyncio.run(main())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _words(response: httpx.Response) -> str:
    """The server's own explanation of a refusal."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


def _reply(response: httpx.Response) -> Any:
    """The JSON of an answer; RunError with the server's own words if it is a refusal."""
    if not response.is_success:
        raise RunError(f"{response.url}: HTTP {response.status_code}: {_words(response)}")
    try:
        return response.json()
    except ValueError:
        raise RunError(f"{response.url}: not JSON: {response.text[:200]!r}") from None


def _completions(reply: Any, asked: Body) -> list[Completion]:
    """The completions of a reply in the order of their seeds; ValueError says what is wrong."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ValueError("no choices")
    if len(choices) != asked["n"]:
        raise ValueError(f"{len(choices)} choices, {asked['n']} were asked for")
    by_index = {choice.get("index"): choice for choice in choices}
    if set(by_index) != set(range(asked["n"])):
        raise ValueError(f"choices numbered {[c.get('index') for c in choices]}")
    return [_completion(by_index[g], asked) for g in range(asked["n"])]


def _completion(choice: dict, asked: Body) -> Completion:
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if choice.get("prompt_token_ids") != asked["prompt"]:
        raise ValueError("prompt_token_ids are not those of the request")
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"token_ids: {str(ids)[:80]}")
    if not logprobs or len(logprobs) != len(ids):
        raise ValueError(f"{len(logprobs or [])} logprobs for {len(ids)} token_ids")
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
        raise ValueError("a logprob is not a finite number")
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason {reason!r}: must be stop or length")
    ends = [token in asked["stop_token_ids"] for token in ids]
    if any(ends[:-1]) or ends[-1] != (reason == "stop"):
        raise ValueError(
            f"finish_reason {reason!r}, but end tokens at {ends.count(True)} places, "
            f"last token {ids[-1]}, stop_token_ids {asked['stop_token_ids']}"
        )
    if reason == "length" and len(ids) != asked["max_tokens"]:
        raise ValueError(
            f"cut at {len(ids)} tokens, max_tokens is {asked['max_tokens']}: the server's "
            "--max-model-len is too small"
        )
    return Completion(ids, logprobs, reason)
