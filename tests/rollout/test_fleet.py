"""A fleet of small servers that are real processes: they write, they answer, they die."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
from ports import free_port

from jgrpo.errors import RunError
from jgrpo.rollout import fleet
from jgrpo.rollout.fleet import Member, run_fleet

SERVER = """
import http.server, os, subprocess, sys
port, child = int(sys.argv[1]), subprocess.Popen(["sleep", "600"])
print("device", os.environ["CUDA_VISIBLE_DEVICES"], "child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(7)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fleet, "LOOK_EVERY_S", 0.05)


def member(device: str, code: str = SERVER) -> Member:
    port = free_port()
    return Member(device, f"http://127.0.0.1:{port}", [sys.executable, "-c", code, str(port)])


async def run(members, during):
    """Run the fleet, do `during` once all are well, end the fleet -> its lines."""
    lines, ready = [], asyncio.Event()
    running = asyncio.create_task(
        run_fleet(members, os.environ, tell=lines.append, ready=ready.set)
    )
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    if running.done():
        running.result()
    assert ready.is_set()
    await during(lines)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return lines


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_each_has_its_device_and_all_end_with_what_they_started():
    members = [member("0"), member("3")]

    async def during(lines):
        for m in members:
            assert httpx.get(f"{m.url}/x", trust_env=False).status_code == 200

    lines = asyncio.run(run(members, during))
    told = {line.split("]")[0][1:]: line.split() for line in lines if "child" in line}
    assert {device: words[2] for device, words in told.items()} == {"0": "0", "3": "3"}
    for words in told.values():
        assert not is_there(int(words[4]))
    for m in members:
        with pytest.raises(httpx.ConnectError):
            httpx.get(m.url, trust_env=False)


def test_one_that_dies_is_started_again_alone():
    members = [member("0"), member("1")]

    async def during(lines):
        async with httpx.AsyncClient(trust_env=False) as client:
            before = [(await client.get(m.url)).text for m in members]
            with contextlib.suppress(httpx.HTTPError):
                await client.get(f"{members[1].url}/die")
            for _ in range(200):
                await asyncio.sleep(0.05)
                with contextlib.suppress(httpx.HTTPError):
                    after = [(await client.get(m.url)).text for m in members]
                    if after[1] != before[1]:
                        break
        assert after[0] == before[0]
        assert after[1] != before[1]

    lines = asyncio.run(run(members, during))
    assert "the server on device 1 ended (exit status 7): it is started again" in lines


def test_one_that_never_comes_up_ends_all_with_its_last_words():
    well = member("0")
    bad = member("1", "print('no such device'); raise SystemExit(3)")

    async def during(lines):
        pytest.fail("not all are well")

    message = r"(?s)device 1 ended \(exit status 3\) before it was well.*no such device"
    with pytest.raises(RunError, match=message):
        asyncio.run(run([well, bad], during))
    with pytest.raises(httpx.ConnectError):
        httpx.get(well.url, trust_env=False)


def test_one_that_dies_again_and_again_ends_all(monkeypatch):
    monkeypatch.setattr(fleet, "MAX_STARTS", 2)
    m = member("0")

    async def during(lines):
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(200):
                await asyncio.sleep(0.05)
                with contextlib.suppress(httpx.HTTPError):
                    await client.get(m.url)
                    await asyncio.sleep(0.5)  # so that it has been found well
                    await client.get(f"{m.url}/die")

    async def main():
        lines = []
        running = asyncio.create_task(run_fleet([m], os.environ, tell=lines.append))
        killing = asyncio.create_task(during(lines))
        try:
            await asyncio.wait_for(running, 60)
        finally:
            killing.cancel()

    with pytest.raises(RunError, match="2 times in 600 s"):
        asyncio.run(main())


def test_a_port_that_is_taken_is_told_before_anything_starts():
    m = member("0")
    with subprocess.Popen(m.command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                          stdout=subprocess.DEVNULL, start_new_session=True) as other:  # fmt: skip
        try:
            for _ in range(200):
                time.sleep(0.05)
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(m.url, trust_env=False).status_code == 200:
                        break
            with pytest.raises(RunError, match=f"{m.url} is taken"):
                asyncio.run(run_fleet([m], os.environ))
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_a_line_without_an_end_is_cut_and_a_bar_shows_its_last_state():
    code = "import sys; sys.stdout.write('x' * 3_000_000 + chr(10) + '10%' + chr(13) + '99%')"
    lines = []

    async def main():
        with contextlib.suppress(RunError):
            await run_fleet([member("0", code)], os.environ, tell=lines.append)

    asyncio.run(main())
    assert sum(line.count("x") for line in lines) == 3_000_000
    assert lines[-1] == "[0] 99%"
