"""Servers that run as one: a process a device, started together, kept running, ended together.

Each has a device of its own (CUDA_VISIBLE_DEVICES) and a port of its own; what they write comes out
line by line with the device before it. One that ends by itself is started again, and whoever asks
it gets its adapter loaded again (`server`). Data parallelism inside one server is no way to use
several devices: an adapter that is loaded reaches one of its replicas only.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from jgrpo.errors import RunError, printable

LOOK_EVERY_S = 0.5
"""So often a server that starts is asked whether it is well."""
END_S = 15.0
"""Seconds that servers have to end by themselves; then they are killed."""
MAX_STARTS, IN_S = 5, 600.0
"""More starts of one server in so many seconds than this, and something is wrong with it."""


@dataclass(frozen=True)
class Member:
    """One server: its device, its URL, and how it is started."""

    device: str
    url: str
    command: Sequence[str]


async def run_fleet(
    members: Sequence[Member],
    environment: Mapping[str, str],
    *,
    tell: Callable[[str], None] = print,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Run all members until this task is cancelled; `ready` is called once all are well.

    `environment`: of every process; its device comes on top. Lines of the servers, and what becomes
    of them, go to `tell`. RunError if one ends before it was ever well, or again and again; the
    others are ended too.
    """
    for member in members:
        if await _answers(member):
            raise RunError(
                f"{member.url} is taken: a server answers there. End it, or give another --vllm_url"
            )
    try:
        async with asyncio.TaskGroup() as group:
            well = [group.create_task(_well(member)) for member in members]
            for member, was_well in zip(members, well, strict=True):
                group.create_task(_keep(member, was_well, environment, tell))
            await asyncio.gather(*well)
            ready()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _keep(
    member: Member,
    was_well: "asyncio.Task[None]",
    environment: Mapping[str, str],
    tell: Callable[[str], None],
) -> None:
    """Start the server, and start it again whenever it has ended; `was_well` is done once it was
    well for the first time."""
    starts: list[float] = []
    while True:
        starts = [s for s in starts if time.monotonic() - s < IN_S] + [time.monotonic()]
        status, last = await _once(member, environment, tell)
        what = f"the server on device {member.device} ended (exit status {status})"
        if not was_well.done():
            raise RunError(f"{what} before it was well. It wrote at last:\n{last}")
        if len(starts) == MAX_STARTS:
            raise RunError(f"{what}, {MAX_STARTS} times in {IN_S:g} s. It wrote at last:\n"
                           f"{last}")  # fmt: skip
        tell(f"{what}: it is started again")


async def _once(
    member: Member, environment: Mapping[str, str], tell: Callable[[str], None]
) -> tuple[int, str]:
    """One life of a server -> its exit status, its last lines."""
    process = await asyncio.create_subprocess_exec(
        *member.command,
        env={**environment, "CUDA_VISIBLE_DEVICES": member.device},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is ours: we end it, and all that it has started
        limit=2**20,
    )
    last: deque[str] = deque(maxlen=10)

    async def pass_on(stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            last.append(printable(line))
            tell(f"[{member.device}] {last[-1]}")

    assert process.stdout
    reading = asyncio.create_task(pass_on(process.stdout))
    try:
        status = await _ended(process)
    finally:
        await _end(process)  # and its children, which would keep its output open
        await reading
    return status, "\n".join(last)


async def _lines(stream: asyncio.StreamReader):
    """The lines of a stream; one that never ends (a progress bar) is cut."""
    while True:
        try:
            raw = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as end:
            if not end.partial:
                return
            raw = end.partial
        except asyncio.LimitOverrunError as over:
            raw = await stream.readexactly(over.consumed)
        yield raw.decode(errors="replace").rstrip("\r\n").rsplit("\r", 1)[-1]


async def _well(member: Member) -> None:
    """Comes back when the server answers."""
    while not await _answers(member):
        await asyncio.sleep(LOOK_EVERY_S)


async def _answers(member: Member) -> bool:
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        with contextlib.suppress(httpx.HTTPError):
            return (await client.get(f"{member.url}/health")).status_code == 200
    return False


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Its exit status. (process.wait() would also wait for whoever else holds its output open.)"""
    while process.returncode is None:
        await asyncio.sleep(0.1)
    return process.returncode


async def _end(process: asyncio.subprocess.Process) -> None:
    """The process and all that it started: asked first, then killed."""
    for wish, patience_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, wish)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_ended(process), patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what has outlived its parent


def keep_running(
    members: Sequence[Member], environment: Mapping[str, str], ready: Callable[[], None]
) -> None:
    """`run_fleet` until Ctrl-C or SIGTERM, which end all servers; lines go to stderr."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await run_fleet(members, environment, ready=ready, tell=_to_stderr)

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        _to_stderr("stopped: all servers have ended")
        raise KeyboardInterrupt("told") from None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
