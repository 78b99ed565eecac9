"""vLLM servers as the sampler: token ids in, the sampled ids and their logprobs out.

Which server gets what is decided here; how one is spoken to, in `server`. A prompt goes to the
server with the fewest tokens outstanding. A server that has sent nothing for `move_s` seconds is
left alone while others are well: what it was asked for goes to them too, with the same seeds, and
the first answer is used, once. Only when no server is left does the run end.

A server fills options that a request leaves open from the model's generation_config.json, so every
option is sent. Ids go both ways, so its tokenizer and its chat template cannot matter. Left out on
purpose: streaming, text, chat.
"""

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import httpx

from jgrpo.errors import RunError
from jgrpo.rollout.background import Background
from jgrpo.rollout.protocol import Completion, Progress
from jgrpo.rollout.replies import Body
from jgrpo.rollout.server import GaveUp, Policies, Server, open_client

T = TypeVar("T")
MAX_AT_WORK, MAX_REQUESTS = 1024, 256
"""Completions, and requests, that a server has at once: more than its batch holds, fewer than its
1,024 sockets. The rest waits for the server that is the first to have room."""
AWAY_S = 2.0
"""Seconds that a server which was away has to show, at each new adapter, that it is back."""
LOOK_EVERY_S = 0.25
"""So often it is seen whether another server could take over a prompt."""
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

    Several servers share the prompts, and each gets every adapter; they must see the run folder
    under the same path. One try of a request may take timeout_s, and so may the wait for a
    server that is away, from its first failure on; with several, the others go on without it after
    move_s. All must be there at the start. Stopping is decided by `stop_token_ids` alone: the
    server's own end tokens are ignored. `max_model_len` is the prompt and completion tokens that
    a server must hold.

    Raises RunError, with what was wrong and how to start the server. Any thread may ask, also while
    another does. One run a server: adapters of others that carry our prefix are unloaded at start,
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
        move_s: float = 60.0,
        alone: bool = True,
    ) -> None:
        remedy = f"Start the server with\n  {start_command}"
        self._policies = Policies()
        self._users: dict[object, Policies] = {self: self._policies}
        """Who needs which: this sampler, those that are held, and what is under way."""
        self._background, self._calls = Background(), set[Future]()
        self._servers = [
            Server(url, run_id=run_id, max_model_len=max_model_len, vocab_size=vocab_size,
                   timeout_s=timeout_s, remedy=remedy, in_use=self._users.values())
            for url in urls
        ]  # fmt: skip
        self._max_tokens = max_tokens
        self._stop_token_ids = list(stop_token_ids)
        self._move_s = move_s
        try:
            self._run(lambda client: (s.enter(client, alone=alone) for s in self._servers))
        except BaseException:
            self._background.stop()
            raise

    def load(self, *folders: Path) -> None:
        """Load the adapters in `folders`, one a member, into every server, then unload those that
        nobody samples from or holds.

        Comes back when all servers that are well sample from the new ones (the others get them when
        they are back, before any prompt); only then may the previous ones' folders be removed
        (removing the folder of a loaded adapter kills the server). The new ones' must stay: a
        server that is restarted needs them again.
        """
        paths = tuple(str(Path(folder).absolute()) for folder in folders)
        self._load(Policies(self._policies.number + 1, paths))

    def unload(self) -> None:
        """Unload the adapters: the base model is sampled from now on."""
        self._load(Policies(self._policies.number + 1))

    def held(self) -> "VllmSampler":
        """As `rollout.Sampler.held`: the servers keep its adapters beside later ones."""
        held = copy.copy(self)
        held._calls = set()
        self._users[held] = held._policies
        return held

    def close(self) -> None:
        """Cancel what this one is at. The last that is closed unloads the adapters, if the servers
        are still there; warns, and never raises, if not."""
        for call in [*self._calls]:
            call.cancel()
        if [*self._users] == [self]:
            for server in self._servers:
                server.timeout_s = min(server.timeout_s, 10.0)
            try:
                self.unload()
            except RunError as error:
                log.warning("adapter not unloaded: %s", error)
            self._background.stop()
        self._users.pop(self, None)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        members: Sequence[int] | None = None,
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
        slots = asyncio.Semaphore(len(self._servers) * min(MAX_REQUESTS, max(1, MAX_AT_WORK // n)))
        policies = self._policies

        async def group(client: httpx.AsyncClient, p: int) -> list[Completion]:
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
            async with slots:
                member = members[p] if members else 0
                completions = await self._first_answer(client, body, policies, member)
            completions *= group_size // n
            if progress:
                progress(len(completions), sum(len(c.token_ids) for c in completions))
            return completions

        under_way = object()
        self._users[under_way] = policies
        try:
            return self._run(lambda client: (group(client, p) for p in range(len(prompts))))
        finally:
            del self._users[under_way]

    async def _first_answer(
        self, client: httpx.AsyncClient, body: Body, policies: Policies, member: int
    ) -> list[Completion]:
        """Of the server with the fewest tokens outstanding, or of one that overtook it."""
        asked: dict[asyncio.Task[list[Completion]], Server] = {}
        gave_up: list[Server] = []
        try:
            while True:
                if server := self._next(asked.values(), gave_up):
                    asked[server.ask(client, body, policies, member)] = server
                look = LOOK_EVERY_S if len(self._servers) > 1 else None
                done, _ = await asyncio.wait(
                    asked, timeout=look, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    server = asked.pop(task)
                    try:
                        return task.result()
                    except GaveUp:
                        gave_up.append(server)
                        if not asked and len(gave_up) == len(self._servers):
                            raise
        finally:
            await _cancel(asked)

    def _next(self, asked: Collection[Server], gave_up: Collection[Server]) -> Server | None:
        """The server for a prompt that so far `asked` were asked for; None: wait for those."""
        if any(server.silent_s < self._move_s for server in asked):
            return None
        others = [s for s in self._servers if s not in asked and s not in gave_up]
        well = [s for s in others if not s.trouble and s.silent_s < self._move_s]
        for server in asked if well else ():
            self._leave(server)
        return min(well or ([] if asked else others), key=lambda s: s.outstanding, default=None)

    def _leave(self, server: Server) -> None:
        if not server.is_left:
            server.trouble = server.trouble or f"no answer for {self._move_s:g} s"
            server.is_left = True
            log.warning("%s: %s; its prompts go to the other servers", server.url, server.trouble)

    def _load(self, policies: Policies) -> None:
        self._policies = self._users[self] = policies
        self._run(lambda client: [self._load_all(client)])

    async def _load_all(self, client: httpx.AsyncClient) -> None:
        """Into every server; those that are away are left behind once others have the adapter."""
        loading = {asyncio.create_task(s.load(client, self._policies)): s for s in self._servers}
        patience = {task: AWAY_S if s.trouble else self._move_s for task, s in loading.items()}
        start, is_loaded, waiting = time.monotonic(), False, set(loading)
        failure: GaveUp | None = None
        try:
            while waiting and not (
                is_loaded and time.monotonic() - start > max(patience[task] for task in waiting)
            ):
                done, waiting = await asyncio.wait(
                    waiting, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    try:
                        task.result()
                        is_loaded = True
                    except GaveUp as error:
                        failure = error
            if failure and not is_loaded:
                raise failure
            for task in waiting:
                self._leave(loading[task])
        finally:
            await _cancel(waiting)

    def _run(
        self, work: Callable[[httpx.AsyncClient], Iterable[Coroutine[Any, Any, T]]]
    ) -> list[T]:
        """Run all of `work` at once; the first failure cancels the rest and is raised as it is."""

        async def main() -> list[T]:
            async with open_client() as client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(coroutine) for coroutine in work(client)]
            return [task.result() for task in tasks]

        try:
            return self._background.run(main(), self._calls)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None


async def _cancel(tasks: Iterable[asyncio.Task]) -> None:
    tasks = [task for task in tasks if task.cancel()]
    await asyncio.gather(*tasks, return_exceptions=True)
