"""One run through several servers: who gets what, and what a slow, a dead and a restarted one of
them may cost. Real HTTP; the servers are small ones that fail on demand."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_server import END, FakeVllm, Reply, good_choice, listening

from jgrpo.errors import RunError
from jgrpo.rollout import server, vllm
from jgrpo.rollout.vllm import VllmSampler

COMPLETIONS, LOAD = "/v1/completions", "/v1/load_lora_adapter"
GROUP = 2


class Told(FakeVllm):
    """Its tokens tell the adapter's folder, the prompt and the seed; takes `lasts_s` a request, one
    after another. `is_deaf`: it takes requests and answers none."""

    def __init__(self, lasts_s: float = 0.0):
        super().__init__()
        self.lasts_s = lasts_s
        self.is_deaf = threading.Event()
        self.engine = threading.Lock()

    def answer(self, path: str, body: dict) -> Reply:
        if self.is_deaf.is_set():
            time.sleep(3)
            return -1, b"{}"
        return super().answer(path, body)

    def completions(self, body: dict) -> Reply:
        folder = self.adapters.get(body["model"])
        if folder is None:
            return 404, {"error": {"message": "The model does not exist."}}
        with self.engine:
            time.sleep(self.lasts_s)
        choices = [good_choice(body, g) for g in range(body["n"])]
        for choice in choices:
            choice["token_ids"].insert(0, 1000 + int(Path(folder).name))
            choice["logprobs"]["token_logprobs"].insert(0, -1.0)
        return 200, {"model": body["model"], "choices": choices}


@contextlib.contextmanager
def three(*fakes: FakeVllm) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(listening(fake)) for fake in fakes]


def sampler_at(urls, **options) -> VllmSampler:
    plain = {"run_id": "7", "max_tokens": 5, "max_model_len": 64, "vocab_size": 2**31,
             "stop_token_ids": [END], "timeout_s": 20, "start_command": "x"}  # fmt: skip
    return VllmSampler(urls, **{**plain, "move_s": 0.6, **options})


def sample(sampler: VllmSampler, n: int, group_size: int = GROUP):
    arrived = []
    groups = sampler.sample(
        [[20 + p] for p in range(n)],
        seeds=[10 * p for p in range(n)],
        group_size=group_size,
        progress=lambda k, tokens: arrived.append((k, tokens)),
    )
    return groups, arrived


def assert_all_are_of(step: int, groups, arrived) -> None:
    """None lost, none doubled, none of another adapter."""
    assert [[c.token_ids for c in group] for group in groups] == [
        [[1000 + step, 20 + p, 100 + 10 * p + g, END] for g in range(GROUP)]
        for p in range(len(groups))
    ]
    assert arrived == [(GROUP, 4 * GROUP)] * len(groups)


def test_the_next_prompt_goes_to_the_server_with_the_fewest_tokens_outstanding(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(vllm, "MAX_REQUESTS", 2)
    quick, slow = Told(0.01), Told(0.25)
    with three(quick, slow) as urls:
        sampler = sampler_at(urls, move_s=30)
        sampler.load(tmp_path / "1")
        assert_all_are_of(1, *sample(sampler, 24))
    shares = [len(fake.bodies(COMPLETIONS)) for fake in (quick, slow)]
    assert sum(shares) == 24  # each was asked for once
    assert shares[0] > 2 * shares[1] > 0


def test_a_slow_servers_prompts_go_to_the_others_after_the_stated_time(tmp_path, caplog):
    one, slow, other = Told(), Told(2.5), Told()
    with three(one, slow, other) as urls:
        sampler = sampler_at(urls)
        sampler.load(tmp_path / "1")
        start = time.monotonic()
        assert_all_are_of(1, *sample(sampler, 9))
        assert 0.6 < time.monotonic() - start < 2.4
        assert len(slow.bodies(COMPLETIONS)) == 3
        counts = Counter(
            body["seed"] for fake in (one, slow, other) for body in fake.bodies(COMPLETIONS)
        )
        assert max(counts.values()) == 2  # the slow one's three, by one of the others each
        assert sum(counts.values()) == 12
    assert f"{urls[1]}: no answer for 0.6 s; its prompts go to the other servers" in caplog.text


def test_equally_slow_servers_are_not_asked_for_each_others_prompts(tmp_path):
    fakes = Told(2.0), Told(2.0)
    with three(*fakes) as urls:
        sampler = sampler_at(urls, move_s=1.0)
        sampler.load(tmp_path / "1")
        assert_all_are_of(1, *sample(sampler, 2))
    assert [len(fake.bodies(COMPLETIONS)) for fake in fakes] == [1, 1]


def test_a_dead_server_is_left_out_and_is_used_again_when_it_is_back(tmp_path, caplog):
    one, dead, other = Told(), Told(), Told()
    with three(one, dead, other) as urls:
        sampler = sampler_at(urls)
        sampler.load(tmp_path / "1")
        assert_all_are_of(1, *sample(sampler, 6))
        dead.is_deaf.set()
        dead.adapters.clear()
        assert_all_are_of(1, *sample(sampler, 6))
        for step in (2, 3):
            sampler.load(tmp_path / f"{step}")
            asked = len(dead.bodies(COMPLETIONS))
            assert_all_are_of(step, *sample(sampler, 6))
            assert len(dead.bodies(COMPLETIONS)) == asked  # nobody waits for it again
        dead.is_deaf.clear()
        sampler.load(tmp_path / "4")
        assert_all_are_of(4, *sample(sampler, 6))
        assert len(dead.bodies(COMPLETIONS)) == asked + 2
        assert list(dead.adapters.values()) == [str(tmp_path / "4")]
        sampler.close()
        assert [fake.adapters for fake in (one, dead, other)] == [{}, {}, {}]
    assert caplog.text.count("its prompts go to the other servers") == 1


def test_a_server_that_is_stopped_in_mid_step_costs_nothing_but_time(tmp_path):
    one, stopped, other = Told(0.05), Told(0.05), Told(0.05)
    with contextlib.ExitStack() as stack, listening(stopped) as url:
        urls = [stack.enter_context(listening(one)), url, stack.enter_context(listening(other))]
        sampler = sampler_at(urls)
        sampler.load(tmp_path / "1")
        real = stopped.answer

        def dies_at_the_third(path: str, body: dict) -> Reply:
            if len(stopped.bodies(COMPLETIONS)) >= 2:
                return 0, None  # the connection is dropped, now and from now on
            return real(path, body)

        stopped.answer = dies_at_the_third
        assert_all_are_of(1, *sample(sampler, 12))
        sampler.load(tmp_path / "2")
        assert_all_are_of(2, *sample(sampler, 12))


def test_a_restarted_one_of_three_gets_the_adapter_again(tmp_path):
    one, restarted, other = Told(), Told(), Told()
    with three(one, restarted, other) as urls:
        sampler = sampler_at(urls)
        sampler.load(tmp_path / "1")
        restarted.adapters.clear()
        assert_all_are_of(1, *sample(sampler, 6))
        assert len(restarted.bodies(LOAD)) == 2


def test_the_run_ends_when_no_server_is_left(tmp_path):
    one, other = Told(), Told()
    with three(one, other) as urls:
        sampler = sampler_at(urls, timeout_s=1.5)
        sampler.load(tmp_path / "1")
        one.is_deaf.set()
        other.is_deaf.set()
        with pytest.raises(RunError, match=r"gave up after 1\.5 s"):
            sample(sampler, 4)


def test_all_must_be_there_at_the_start():
    with three(Told()) as urls, pytest.raises(RunError, match=r"127\.0\.0\.1:9/v1/models"):
        sampler_at([*urls, "http://127.0.0.1:9"], timeout_s=0.5)


def test_an_answer_that_is_wrong_ends_the_run_whoever_else_is_well(tmp_path):
    one, other = Told(), Told()
    with three(one, other) as urls:
        sampler = sampler_at(urls)
        sampler.load(tmp_path / "1")
        one.base["root"] = "models/other"
        one.adapters.clear()
        with pytest.raises(RunError, match="another base model"):
            sample(sampler, 4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same waits between tries, and for a server that was away, but shorter."""
    real = server.tenacity.wait_random_exponential
    monkeypatch.setattr(
        server.tenacity, "wait_random_exponential", lambda **_: real(multiplier=0.01, max=0.2)
    )
    monkeypatch.setattr(vllm, "AWAY_S", 0.5)
    monkeypatch.setattr(vllm, "LOOK_EVERY_S", 0.05)
