"""The vLLM client and a server on which everything goes wrong: hundreds of faults, drawn from a
seed, in a run of many requests; what comes out is what a server without faults gives."""

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_server import CUT, DROP, END, FakeVllm, Reply, good_choice, listening

from jgrpo.rollout import server
from jgrpo.rollout.protocol import Completion
from jgrpo.rollout.replies import completions_of
from jgrpo.rollout.vllm import VllmSampler

STEPS, PROMPTS, GROUP = 6, 64, 4
SERVER_ERRORS = (408, 429, 500, 502, 503, 504)
KINDS = ("drop", "cut", "torn JSON", "status", "slow", "abort", "answer lost", "restart")


class Faulty(FakeVllm):
    """Which try of which request fails, and how, depends on the seed alone. Tokens tell the prompt,
    the seed and the folder of the adapter that they come from."""

    def __init__(self, seed: int, share: float):
        super().__init__()
        self.seed, self.share = seed, share
        self.tries: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()

    def answer(self, path: str, body: dict) -> Reply:
        asked = "a completion" if "prompt" in body else path
        request = f"{asked} {body.get('prompt')} {body.get('seed')} {body.get('lora_path')}"
        with self.lock:
            self.tries[request] += 1
            draw = random.Random(f"{self.seed} {request} {self.tries[request]}")
        kind = draw.choice(KINDS) if draw.random() < self.share else None
        rarely = draw.random() < 0.3
        if (kind == "abort" and "prompt" not in body) or (kind == "restart" and not rarely):
            kind = "slow"
        if kind:
            with self.lock:
                self.injected[kind] += 1
        if kind == "drop":
            return DROP, None
        if kind == "status":
            return draw.choice(SERVER_ERRORS), {"error": {"message": "overloaded"}}
        if kind == "torn JSON" and path in ("/v1/completions", "/v1/models"):
            return 200, b'{"model": "base", "choices": [{"index": 0, "tok'
        if kind == "slow":
            threading.Event().wait(draw.random() * 0.1)
        if kind == "restart":
            self.adapters.clear()
        status, reply = super().answer(path, body)
        if kind in ("cut", "answer lost"):
            return (CUT if kind == "cut" else DROP), reply
        if kind == "abort" and status == 200:
            reply["choices"][-1] |= {"finish_reason": "abort", "token_ids": []}
        return status, reply

    def completions(self, body: dict) -> Reply:
        folder = self.adapters.get(body["model"])
        if folder is None:
            return 404, {"error": {"message": "The model does not exist."}}
        choices = [good_choice(body, g) for g in range(body["n"])]
        for choice in choices:
            choice["token_ids"][0] = 1000 + int(Path(folder).name.removeprefix("step_"))
        return 200, {"model": body["model"], "choices": choices}


def run_through(server: Faulty, root: Path) -> tuple[list[Any], list[tuple[int, int]]]:
    """Six steps of a run -> the groups of each, and what was reported as progress."""
    steps, arrived = [], []
    with listening(server) as url:
        sampler = VllmSampler(
            [url], run_id="1", max_tokens=4, max_model_len=64, vocab_size=2**31,
            stop_token_ids=[END], timeout_s=60, start_command="start",
        )  # fmt: skip
        for step in range(STEPS):
            sampler.load(root / f"step_{step:06d}")
            first = step * 100_000
            seeds = range(first, first + PROMPTS * 10, 10)
            prompts = [[10 + p, step] for p in range(PROMPTS)]
            report = lambda n, tokens: arrived.append((n, tokens))  # noqa: E731
            steps.append(sampler.sample(prompts, seeds=seeds, group_size=GROUP, progress=report))
        sampler.close()
    return steps, arrived


@pytest.fixture
def quick(monkeypatch):
    """The same waits, a fiftieth as long."""
    real = tenacity.wait_random_exponential
    monkeypatch.setattr(
        server.tenacity, "wait_random_exponential", lambda **_: real(multiplier=0.01, max=0.4)
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_hundreds_of_faults_change_nothing(seed, tmp_path, caplog):
    calm, faulty = Faulty(0, share=0.0), Faulty(seed, share=0.4)
    expected, _ = run_through(calm, tmp_path)
    found, arrived = run_through(faulty, tmp_path)
    print(f"{faulty.injected.total()} faults: {dict(faulty.injected)}")  # pytest -s
    assert faulty.injected.total() > 200
    assert set(faulty.injected) == set(KINDS)
    assert found == expected
    for step, groups in enumerate(found):
        for p, group in enumerate(groups):
            seed_of_p = step * 100_000 + 10 * p
            ids = [[1000 + step, 100 + seed_of_p + g, END] for g in range(GROUP)]
            assert [c.token_ids for c in group] == ids
    assert arrived == [(GROUP, 3 * GROUP)] * (STEPS * PROMPTS)  # none twice
    assert not faulty.adapters
    assert sum("still trying" in r.getMessage() for r in caplog.records) < 3


# -- the reply parser -------------------------------------------------------------------------

ASKED = {
    "model": "m",
    "prompt": [5, 6],
    "seed": 0,
    "n": 2,
    "max_tokens": 4,
    "stop_token_ids": [END],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, -9999.0, "stop", "length", "abort", 0, 1, 2]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)  # fmt: skip


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """The path of every part of a JSON value."""
    if not isinstance(value, dict | list):
        return [above]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [above, *(place for key, x in inner for place in places(x, (*above, key)))]


def replaced(value: Any, place: tuple, new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(value[place[0]], place[1:], new)
    return copy


GOOD = {"model": "m", "choices": [good_choice(ASKED, g) for g in range(2)]}


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_whatever_stands_in_a_reply_gives_completions_that_can_be_trained_on_or_a_valueerror(data):
    reply = GOOD
    for _ in range(data.draw(st.integers(1, 3))):
        reply = replaced(reply, data.draw(st.sampled_from(places(reply))), data.draw(JSON))
    try:
        completions = completions_of(reply, ASKED, 2**31)
    except ValueError:
        return
    assert len(completions) == 2
    for c in completions:
        assert isinstance(c, Completion)
        assert 0 < len(c.token_ids) == len(c.logprobs) <= ASKED["max_tokens"]
        assert all(-9999 < x < 0.01 for x in c.logprobs)
        assert (c.token_ids[-1] == END) == (c.finish_reason == "stop")
        assert END not in c.token_ids[:-1]
