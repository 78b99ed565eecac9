"""The vLLM client against a small HTTP server that fails on demand (test_serve.py: a real vLLM)."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_server import CUT, DROP, END, UNKNOWN, FakeVllm, good_choice, listening

from jgrpo.errors import RunError
from jgrpo.rollout import server
from jgrpo.rollout.vllm import VllmSampler

MAX_TOKENS = 4


@pytest.fixture
def fake() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def url(fake: FakeVllm) -> Iterator[str]:
    with listening(fake) as address:
        yield address


def sampler_at(*urls: str, **options: Any) -> VllmSampler:
    plain = {
        "run_id": "7",
        "max_tokens": MAX_TOKENS,
        "max_model_len": 64,
        "vocab_size": 2**31,
        "stop_token_ids": [END],
        "timeout_s": 20,
        "start_command": "python -m jgrpo.serve --config c.py",
    }
    return VllmSampler(urls, **{**plain, **options})


COMPLETIONS, LOAD, UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
WRONG = {"error": {"message": "x"}}


def test_completions_belong_to_their_prompt_whatever_the_order_of_the_replies(url, fake):
    arrived = []
    prompts = [[10 + p, 3] for p in range(8)]
    groups = sampler_at(url).sample(
        prompts,
        seeds=range(0, 80, 10),
        group_size=3,
        progress=lambda n, tokens: arrived.append((n, tokens)),
    )
    assert [[c.token_ids for c in group] for group in groups] == [
        [[10 + p, 100 + 10 * p + g, END] for g in range(3)] for p in range(8)
    ]
    assert groups[0][0].logprobs == [-0.5, -1.5, -2.5]
    assert arrived == [(3, 9)] * 8


def test_choices_are_put_in_the_order_of_their_seeds(url, fake):
    fake.change = lambda choices: choices[::-1]
    [group] = sampler_at(url).sample([[17]], seeds=[0], group_size=3)
    assert [c.token_ids[1] for c in group] == [100, 101, 102]


def test_no_sampling_parameter_is_left_to_the_server(url, fake):
    sampler_at(url).sample([[17, 3]], seeds=[5], group_size=2, temperature=0.7)
    assert fake.bodies(COMPLETIONS) == [
        {
            "model": "base",
            "prompt": [17, 3],
            "n": 2,
            "seed": 5,
            "max_tokens": MAX_TOKENS,
            "min_tokens": 0,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": [],
            "stop_token_ids": [END],
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": False,
        }
    ]


def test_top_p_is_sent_where_it_is_asked_for(url, fake):
    sampler_at(url).sample([[17]], seeds=[0], temperature=0.6, top_p=0.95)
    assert fake.bodies(COMPLETIONS)[0]["top_p"] == 0.95


def test_a_greedy_group_is_one_completion_repeated(url, fake):
    [group] = sampler_at(url).sample([[17]], seeds=[0], group_size=3, temperature=0)
    assert len(group) == 3
    assert group[0] == group[2]
    assert fake.bodies(COMPLETIONS)[0]["n"] == 1


@pytest.mark.parametrize(
    "faults",
    [
        [(DROP, None)],
        [(CUT, {"choices": []})],
        [(200, b'{"choices": [{"index"')],  # a proxy passed on what it got, as if it were all
        [(500, b"oops"), (500, b"oops")],
        pytest.param(
            [(503, WRONG), (502, b""), (429, WRONG), (408, b"")], marks=pytest.mark.slow
        ),  # the waits become longer
    ],
)
def test_a_server_that_comes_back_is_not_noticed(url, fake, faults):
    sampler = sampler_at(url)
    fake.faults[COMPLETIONS] = list(faults)
    [group] = sampler.sample([[17]], seeds=[0])
    assert group[0].token_ids == [17, 100, END]
    assert len(fake.bodies(COMPLETIONS)) == len(faults) + 1


def test_a_server_that_stays_broken_ends_in_its_own_words_and_a_remedy(url, fake):
    sampler = sampler_at(url, timeout_s=1)
    fake.faults[COMPLETIONS] = [(503, {"error": {"message": "engine is dead"}})] * 100
    with pytest.raises(RunError, match=r"(?s)503: engine is dead; gave up after 1 s.*jgrpo\.serve"):
        sampler.sample([[17], [16]], seeds=[0, 1])


def test_a_server_that_hangs_is_given_up_after_the_timeout(url, fake):
    sampler = sampler_at(url, timeout_s=0.5)
    fake.change = lambda choices: time.sleep(1.5)
    start = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)no answer; gave up after 0\.5 s.*vllm_timeout_s"):
        sampler.sample([[17]], seeds=[0])
    assert time.monotonic() - start < 1.4


def test_no_server_at_all_says_how_to_start_one(caplog):
    with pytest.raises(RunError, match=r"(?s)connection.*python -m jgrpo\.serve --config c\.py"):
        sampler_at("http://127.0.0.1:9", timeout_s=1)
    assert "still trying, for 1 s more" in caplog.text
    assert "jgrpo.serve" in caplog.text


@pytest.mark.slow
def test_waiting_is_told_once_for_all_requests_and_now_and_again(url, fake, caplog, monkeypatch):
    sampler = sampler_at(url, timeout_s=2)
    monkeypatch.setattr(server, "TELL_EVERY_S", 0.8)
    fake.faults[COMPLETIONS] = [(503, WRONG)] * 1000
    with pytest.raises(RunError, match="gave up after 2 s"):
        sampler.sample([[17]] * 20, seeds=range(20))
    told = [float(r.getMessage().split("for ")[1].split(" s more")[0]) for r in caplog.records]
    assert 2 <= len(told) <= 3
    assert told == sorted(told, reverse=True)
    assert told[0] == 2


@pytest.mark.slow
def test_a_server_that_was_away_has_as_long_to_answer_as_any(url, fake, monkeypatch):
    """The wait for it, 2 of the 3 s, is not taken from the 2 s that the answer needs."""
    monkeypatch.setattr(server.tenacity, "wait_random_exponential", lambda **_: lambda _: 0.1)
    sampler = sampler_at(url, timeout_s=3)
    back_s = time.monotonic() + 2
    real = fake.completions

    def completions(body: dict) -> tuple[int, Any]:
        if time.monotonic() < back_s:
            return 503, WRONG
        time.sleep(2)
        return real(body)

    monkeypatch.setattr(fake, "completions", completions)
    [group] = sampler.sample([[17]], seeds=[0])
    assert group[0].token_ids == [17, 100, END]


def test_the_server_s_refusal_is_shown_and_not_retried(url, fake):
    sampler = sampler_at(url)
    fake.faults[COMPLETIONS] = [(400, {"error": {"message": "Token id 300 is out of vocabulary"}})]
    with pytest.raises(RunError, match="HTTP 400: Token id 300 is out of vocabulary"):
        sampler.sample([[300]], seeds=[0])
    assert len(fake.bodies(COMPLETIONS)) == 1


def change_first(**fields: Any) -> Callable[[list[dict]], Any]:
    return lambda choices: [{**choices[0], **fields}, *choices[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choices: choices[:1], "1 choices, 2 were asked for"),
        (lambda choices: None, "no choices"),
        (lambda choices: [choices[0], choices[0]], r"choices numbered \[0, 0\]"),
        (change_first(prompt_token_ids=[9]), "prompt_token_ids are not those of the request"),
        (change_first(token_ids=None), "no token ids: the server does not know return_token_ids"),
        (change_first(token_ids=[17, -1, END]), r"token_ids: \[17, -1, 1\]"),
        (change_first(token_ids=[17, 2**31, END]), "the model knows 2147483648"),
        (
            change_first(
                token_ids=[17] * MAX_TOKENS + [END],
                logprobs={"token_logprobs": [0.0] * (MAX_TOKENS + 1)},
            ),
            f"{MAX_TOKENS + 1} tokens, max_tokens is {MAX_TOKENS}",
        ),
        (change_first(logprobs=None), "token_logprobs of 3 token_ids: None"),
        (
            change_first(logprobs={"token_logprobs": [-1.0, -1.0]}),
            r"of 3 token_ids: \[-1.0, -1.0\]",
        ),
        (change_first(logprobs={"token_logprobs": [0.0, math.nan, 0.0]}), "must be numbers"),
        (change_first(logprobs={"token_logprobs": [0.0, None, 0.0]}), "must be numbers"),
        (change_first(logprobs={"token_logprobs": [0.0, -9999.0, 0.0]}), "must be numbers"),
        (change_first(logprobs={"token_logprobs": [0.0, 0.5, 0.0]}), "must be numbers"),
        (change_first(finish_reason="error"), "finish_reason 'error'"),
        (change_first(token_ids=[17, 100, 101]), "end tokens at 0 places, last token 101"),
        (change_first(token_ids=[17, END, END]), "end tokens at 2 places"),
        (change_first(finish_reason="length"), "finish_reason 'length', but end tokens at 1"),
        (change_first(finish_reason="length", token_ids=[17, 5, 5]), "cut at 3 tokens.*max-model"),
    ],
)
def test_a_reply_that_could_corrupt_training_ends_the_run(url, fake, change, message):
    fake.change = change
    with pytest.raises(RunError, match=f"{url}/v1/completions: bad reply: .*{message}"):
        sampler_at(url).sample([[17]], seeds=[0], group_size=2)


def test_a_reply_of_another_model_ends_the_run(url, fake, tmp_path):
    sampler = sampler_at(url)
    sampler.load(tmp_path)
    choices = [good_choice({"prompt": [17], "seed": 0}, 0)]
    fake.faults[COMPLETIONS] = [(200, {"model": "jgrpo-6-step_000000", "choices": choices})]
    with pytest.raises(RunError, match=r"model 'jgrpo-6-step_000000', 'jgrpo-7-.*was asked for"):
        sampler.sample([[17]], seeds=[0])
    assert len(fake.bodies(COMPLETIONS)) == 1


def test_what_a_server_aborts_as_it_shuts_down_is_asked_for_again(url, fake):
    sampler = sampler_at(url)
    changes = iter([change_first(finish_reason="abort", token_ids=[17])])
    fake.change = lambda choices: next(changes, lambda c: c)(choices)
    [group] = sampler.sample([[17]], seeds=[0], group_size=2)
    assert [c.token_ids for c in group] == [[17, 100, END], [17, 101, END]]


def test_a_reply_that_is_not_json_is_quoted(url, fake):
    fake.faults[COMPLETIONS] = [(200, b"<html>proxy</html>")]
    with pytest.raises(RunError, match="not JSON: '<html>proxy</html>'"):
        sampler_at(url).sample([[17]], seeds=[0])


def test_each_policy_has_a_new_name_and_the_previous_one_goes_after_it_came(url, fake, tmp_path):
    sampler = sampler_at(url)
    for folder in ("step_000000", "step_000001", "step_000001"):
        sampler.load(tmp_path / folder)
        [(name, path)] = fake.adapters.items()
        assert name.startswith(f"jgrpo-7-{folder}-")
        assert path == str(tmp_path / folder)
        sampler.sample([[17]], seeds=[0])
        assert fake.bodies(COMPLETIONS)[-1]["model"] == name
    names = [body["lora_name"] for body in fake.bodies(LOAD)]
    assert len(set(names)) == 3
    lora_calls = [(p, b["lora_name"]) for p, b in fake.calls if "lora" in p]
    assert lora_calls == [
        (LOAD, names[0]),
        (LOAD, names[1]),
        (UNLOAD, names[0]),
        (LOAD, names[2]),
        (UNLOAD, names[1]),
    ]
    sampler.unload()
    sampler.sample([[17]], seeds=[0])
    assert not fake.adapters
    assert fake.bodies(COMPLETIONS)[-1]["model"] == "base"


def test_a_relative_folder_is_sent_as_an_absolute_one(url, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampler_at(url).load(tmp_path.relative_to(tmp_path) / "a")
    assert list(fake.adapters.values()) == [str(tmp_path / "a")]


def test_an_adapter_loaded_by_a_try_whose_answer_was_lost_counts_as_loaded(url, fake, tmp_path):
    sampler = sampler_at(url)
    real = fake.load_lora_adapter

    def load_and_hang_up(body: dict) -> tuple[int, None]:
        fake.load_lora_adapter = real
        real(body)
        return 0, None

    fake.load_lora_adapter = load_and_hang_up
    sampler.load(tmp_path)
    assert len(fake.bodies(LOAD)) == 2
    assert len(fake.adapters) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, {"detail": "Not Found"}), r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.*jgrpo\.serve"),
        ((404, {"error": {"message": "No adapter found"}}), "must see that folder"),
        ((500, {"error": {"message": "LoRA rank 8 is greater"}}), "LoRA rank 8 is gr.*max-lora-r"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_says_why(url, fake, tmp_path, reply, message):
    sampler = sampler_at(url)
    fake.faults[LOAD] = [reply] * 9
    with pytest.raises(RunError, match=f"(?s){message}"):
        sampler.load(tmp_path)
    assert len(fake.bodies(LOAD)) == 1 + (reply[0] == 500)


def test_an_adapter_that_a_dying_engine_refuses_is_loaded_once_the_engine_is_well(
    url, fake, tmp_path
):
    sampler = sampler_at(url)
    fake.faults[LOAD] = [(500, {"error": {"message": "EngineCore encountered an issue"}})]
    fake.faults["/health"] = [(503, b""), (DROP, None)]
    sampler.load(tmp_path)
    assert len(fake.bodies("/health")) == 3
    assert list(fake.adapters.values()) == [str(tmp_path)]


def test_each_request_names_its_member_s_adapter_also_after_a_restart(url, fake, tmp_path, caplog):
    """Three are loaded, the three before go; a server that loses them gets all again."""
    folders = [tmp_path / f"member_{e}" for e in range(3)]
    sampler = sampler_at(url)
    for n_lost in (0, 0, 5):
        sampler.load(*folders)
        assert sorted(fake.adapters.values()) == sorted(map(str, folders))
        before = len(fake.calls)
        if n_lost:
            restart_at(fake, n_lost)
        members = [0, 1, 2, 2, 1, 0, 0, 1]
        prompts = [[10 + p] for p in range(8)]
        groups = sampler.sample(prompts, seeds=range(8), members=members, group_size=2)
        assert [g[0].token_ids[0] for g in groups] == [10 + p for p in range(8)]
        used: dict[int, set[str]] = {}
        for path, body in fake.calls[before:]:
            if path == COMPLETIONS and body["model"] in fake.adapters:
                used.setdefault(members[body["prompt"][0] - 10], set()).add(body["model"])
        for e, names in used.items():
            assert {fake.adapters[name] for name in names} == {str(folders[e])}
    assert "lost our adapter" in caplog.text
    sampler.close()
    assert fake.adapters == {}


def test_leftovers_of_a_crashed_run_are_removed_at_start_and_foreign_adapters_kept(
    url, fake, caplog
):
    fake.adapters = {"jgrpo-3-step_000004-ab": "/gone", "mine": "/kept"}
    sampler_at(url)
    assert list(fake.adapters) == ["mine"]
    assert "unloaded jgrpo-3-step_000004-ab" in caplog.text


def test_an_evaluation_beside_a_run_leaves_the_run_its_adapter(url, fake, tmp_path):
    fake.adapters = {"jgrpo-3-step_000004-ab": "/in-use"}
    sampler = sampler_at(url, alone=False)
    sampler.load(tmp_path)
    sampler.close()
    assert list(fake.adapters) == ["jgrpo-3-step_000004-ab"]


def restart_at(fake: FakeVllm, n: int, **base: Any) -> None:
    """Have the server lose its adapters after n completions; `base`: in what it then differs."""
    real, asked = fake.completions, []

    def completions(body: dict) -> tuple[int, Any]:
        with fake.lock:
            reply = real(body)
            asked.append(body)
            if len(asked) == n:
                fake.adapters.clear()
                fake.base |= base
        return reply

    fake.completions = completions


def test_a_restarted_server_gets_the_adapter_once_under_a_new_name_and_what_was_not_answered(
    url, fake, tmp_path, caplog
):
    sampler = sampler_at(url)
    sampler.load(tmp_path)
    [first] = fake.adapters
    restart_at(fake, 4)
    groups = sampler.sample([[17, p] for p in range(12)], seeds=range(12), group_size=2)
    assert [g[1].token_ids for g in groups] == [[17, 101 + p, END] for p in range(12)]
    [second] = fake.adapters
    assert first != second
    assert [body["lora_path"] for body in fake.bodies(LOAD)] == [str(tmp_path)] * 2
    asked = [(body["model"], body["prompt"][1]) for body in fake.bodies(COMPLETIONS)]
    again = [p for model, p in asked if model == second]
    assert 0 < len(again) == len(set(again)) <= 8
    assert sorted(p for model, p in asked if model == first) == [*range(12)]
    assert "lost our adapter" in caplog.text
    sampler.close()
    assert not fake.adapters


@pytest.mark.slow
def test_a_server_that_keeps_losing_the_adapter_ends_the_run(url, fake, tmp_path):
    sampler = sampler_at(url)
    sampler.load(tmp_path)
    fake.faults[COMPLETIONS] = [(404, UNKNOWN)] * 99
    with pytest.raises(RunError, match=r"does not know jgrpo-7-.*again and again"):
        sampler.sample([[17]], seeds=[0])
    assert len(fake.bodies(LOAD)) == 1 + server.MAX_RELOADS + 1


@pytest.mark.parametrize("field", [{"root": "models/other"}, {"max_model_len": 32}, {"id": "b"}])
def test_a_server_that_comes_back_with_another_base_ends_the_run(url, fake, tmp_path, field):
    sampler = sampler_at(url)
    sampler.load(tmp_path / "0")
    restart_at(fake, 1, **field)
    sampler.sample([[17]], seeds=[0])
    was, now = "'base', 'models/base', 64", next(iter(field.values()))
    with pytest.raises(RunError, match=rf"another base model: it was \({was}\), it is \(.*{now}"):
        sampler.sample([[17]], seeds=[1])
    with pytest.raises(RunError, match="another base model"):  # or between two steps
        sampler.load(tmp_path / "1")


def test_a_context_too_short_for_the_run_is_found_at_start(url, fake):
    fake.base["max_model_len"] = 32
    with pytest.raises(RunError, match=r"max-model-len 32; this run needs 64"):
        sampler_at(url)


def test_several_servers_share_the_prompts_and_each_gets_the_adapter(url, fake, tmp_path):
    other = FakeVllm()
    with listening(other) as other_url:
        sampler = sampler_at(url, other_url + "/")
        sampler.load(tmp_path)
        groups = sampler.sample([[14], [15], [16]], seeds=[0, 10, 20])
        assert [g[0].token_ids[:2] for g in groups] == [[14, 100], [15, 110], [16, 120]]
        assert [b["prompt"] for b in other.bodies(COMPLETIONS)] == [[15]]
        for server in (fake, other):
            assert list(server.adapters.values()) == [str(tmp_path)]
        sampler.close()
        assert not fake.adapters
        assert not other.adapters


def asked_of(fake: FakeVllm, prompt: int) -> str:
    """The folder of the adapter that a prompt was sampled from; its server may have it no more."""
    paths = {body["lora_name"]: body["lora_path"] for body in fake.bodies(LOAD)}
    [body] = [b for b in fake.bodies(COMPLETIONS) if b["prompt"] == [prompt]]
    return Path(paths[body["model"]]).name


@pytest.mark.parametrize("n_ahead", [1, 2])
def test_adapters_that_are_held_stay_loaded_beside_newer_ones_until_they_are_let_go(
    n_ahead, url, fake, tmp_path
):
    """As rollouts run ahead: at most K + 1 adapters, each held by the step that it samples."""
    sampler = sampler_at(url)
    held: list[tuple[int, VllmSampler]] = []
    for step in range(6):
        sampler.load(tmp_path / f"step_{step}")
        there = sorted(Path(path).name for path in fake.adapters.values())
        assert there == [f"step_{k}" for k in range(max(0, step - n_ahead), step + 1)]
        held.append((step, sampler.held()))
        if len(held) > n_ahead:
            policy, oldest = held.pop(0)
            oldest.sample([[20 + policy]], seeds=[0])
            oldest.close()
            assert asked_of(fake, 20 + policy) == f"step_{policy}"
    sampler.sample([[30]], seeds=[0])  # an evaluation between steps
    assert asked_of(fake, 30) == "step_5"
    for _, one in held:
        one.close()
    sampler.close()
    assert not fake.adapters


def test_an_adapter_in_use_is_not_unloaded_while_another_thread_loads_the_next(url, fake, tmp_path):
    """The completions of the first are held back until the second is there."""
    sampler, loaded = sampler_at(url), threading.Event()
    sampler.load(tmp_path / "first")
    real = fake.completions

    def completions(body: dict) -> tuple[int, Any]:
        if body["prompt"] == [17]:
            assert loaded.wait(10)
        return real(body)

    fake.completions = completions
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(sampler.sample, [[17], [18]], seeds=[0, 10])
        while not fake.bodies(COMPLETIONS):
            time.sleep(0.01)
        sampler.load(tmp_path / "second")
        assert sorted(map(Path, fake.adapters.values())) == [
            tmp_path / "first",
            tmp_path / "second",
        ]
        sampler.sample([[19]], seeds=[0])
        loaded.set()
        assert [g[0].token_ids[0] for g in under_way.result()] == [17, 18]
    assert [asked_of(fake, p) for p in (17, 18, 19)] == ["first", "first", "second"]
    sampler.load(tmp_path / "third")
    assert [Path(path).name for path in fake.adapters.values()] == ["third"]


def test_a_restarted_server_gets_the_adapter_that_is_asked_for_whichever_is_newest(
    url, fake, tmp_path
):
    sampler = sampler_at(url)
    sampler.load(tmp_path / "old")
    held = sampler.held()
    sampler.load(tmp_path / "new")
    fake.adapters.clear()
    held.sample([[17]], seeds=[0], group_size=2)
    assert [Path(path).name for path in fake.adapters.values()] == ["old"]
    sampler.sample([[18]], seeds=[0])
    assert sorted(Path(path).name for path in fake.adapters.values()) == ["new", "old"]
    held.close()
    sampler.close()
    assert not fake.adapters


def test_who_closes_a_sampler_ends_what_it_is_at_in_another_thread_and_nothing_else(
    url, fake, tmp_path
):
    sampler, go_on = sampler_at(url), threading.Event()
    sampler.load(tmp_path)
    fake.change = lambda choices: go_on.wait(20) and choices
    held = sampler.held()
    with ThreadPoolExecutor(2) as pool:
        given_up = pool.submit(held.sample, [[17]], seeds=[0])
        goes_on = pool.submit(sampler.sample, [[18]], seeds=[0])
        while len(fake.bodies(COMPLETIONS)) < 2:
            time.sleep(0.01)
        start = time.monotonic()
        held.close()
        with pytest.raises(CancelledError):
            given_up.result(timeout=5)
        assert time.monotonic() - start < 3
        go_on.set()
        assert goes_on.result()[0][0].token_ids[0] == 18
    assert len(fake.adapters) == 1
    sampler.close()
    assert not fake.adapters


def test_close_does_not_mind_that_the_server_is_gone(fake, tmp_path, caplog):
    with listening(fake) as url:
        sampler = sampler_at(url, timeout_s=0.5)
        sampler.load(tmp_path)
    sampler.close()
    assert "adapter not unloaded" in caplog.text
