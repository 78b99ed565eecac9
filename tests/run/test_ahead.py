"""Rollouts that run ahead: which adapter samples what, that a stopped run goes on to the bit, that
the guard knows the adapter that sampled, and what becomes of errors in the other thread."""

import functools
import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import (
    comparable,
    final_adapter,
    read_lines,
    same_bits,
    tiny_config,
)

from jgrpo import train as train_module
from jgrpo.config import Config
from jgrpo.errors import InputError, RunError
from jgrpo.policy import adapter as adapters
from jgrpo.replay import replay
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.run.ahead import Ahead
from jgrpo.run.collect import Collector
from jgrpo.run.evaluation import evaluate
from jgrpo.run.groups import Rollout
from jgrpo.run.probe import gaps_to
from jgrpo.run.rundir import adapter_folder, read_metrics, rollouts_file
from jgrpo.run.sampler import open_sampler
from jgrpo.run.screen import Screen
from jgrpo.run.session import open_session
from jgrpo.study.compare import read_rollouts, saved_rows
from jgrpo.train import new_learner, train, train_together

STEPS = 4


def config_of(root, n_ahead: int, **changes) -> Config:
    """Steps so large that each adapter is told from the next; groups are replaced, so that a step
    asks for more in rounds."""
    return tiny_config(root, **{
        "rollouts_ahead": n_ahead, "n_grpo_steps": STEPS, "lr": 5e-3, "use_dynamic_sampling": True,
        "checkpoint_every": 1, "save_total_limit": 9, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def runs(root):
    """By how far they run ahead."""
    return functools.cache(lambda n_ahead: train(config_of(root, n_ahead)))


@pytest.fixture(scope="module")
def session(root):
    with ExitStack() as stack:
        yield open_session([config_of(root, 0)], stack)


@pytest.fixture(scope="module")
def sampler(session):
    return open_sampler(session.shared, session.policy, session.problems.stop_token_ids, "t")


def steps_of(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if "train/loss" in row]


def completions(run: Path, step: int) -> list[list]:
    return [[row["prompt_ids"], row["token_ids"], row["sampler_logprobs"]]
            for row in read_lines(rollouts_file(run, step))]  # fmt: skip


def sampled_by_hand(session, sampler, folder: Path, step: int) -> list[list]:
    sampler.load(folder)
    collector = Collector(session.configs, session.problems, sampler, session.grader)
    with Screen(STEPS, live=False) as screen:
        rollout = collector.collect(step, screen)[0]
    rows = rollout.rows(np.zeros((4, 8), np.float32), False)
    return [[*map(list, row)] for row in
            zip(rows.prompts, rows.completions, rows.sampler_logprobs, strict=True)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("n_ahead", [0, 1, 2])
def test_step_k_is_sampled_with_adapter_k_1_K_and_its_rows_say_so(n_ahead, runs, session, sampler):
    run = runs(n_ahead)
    for step in range(1, STEPS + 1):
        policy = max(0, step - 1 - n_ahead)
        rows = read_lines(rollouts_file(run, step))
        assert {row["policy_step"] for row in rows} == {policy}
        found = sampled_by_hand(session, sampler, adapter_folder(run, policy), step)
        assert completions(run, step) == found
        if step > 2:  # another adapter would have been seen
            other = adapter_folder(run, policy + 1)
            assert completions(run, step) != sampled_by_hand(session, sampler, other, step)
    assert [row["staleness/steps"] for row in steps_of(run)] == [
        min(k - 1, n_ahead) for k in range(1, STEPS + 1)
    ]


@pytest.mark.slow
def test_the_gap_is_to_the_adapter_that_sampled_and_the_way_since_has_a_name_of_its_own(runs):
    for row in steps_of(runs(2)):
        assert 0 < row["sampler/logprob_diff_mean"] < 1e-5
        assert row["sampler/logprob_diff_max"] < 1e-4
        assert abs(row["sampler/kl"]) < 1e-6
        if row["staleness/steps"]:
            assert row["staleness/logprob_diff_mean"] > 1e-3
            assert abs(row["train/importance_weight"] - 1) > 1e-4
        else:
            assert "staleness/logprob_diff_mean" not in row
    assert not any(tag in row for row in steps_of(runs(0))
                   for tag in ("staleness/kl", "train/importance_weight"))  # fmt: skip


@pytest.mark.slow
def test_evaluations_are_of_the_newest_adapter(runs, session, sampler):
    for row in read_metrics(runs(1)):
        if "eval/accuracy" in row:
            sampler.load(adapter_folder(runs(1), row["step"]))
            found = evaluate(session.shared, sampler, session.grader, session.problems).metrics
            assert {tag: row[tag] for tag in found} == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_ahead", "stop_at"),
    [(1, 1), (1, 2), (1, 4), (2, 1), (2, 3)],
)
def test_stopped_at_any_step_and_resumed_it_is_the_same_run_to_the_bit(
    n_ahead, stop_at, runs, root, monkeypatch
):
    """Ctrl-C after the update of a step, while the next ones are sampled."""
    whole, config, real = runs(n_ahead), config_of(root, n_ahead), train_module.step_metrics
    calls = []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "step_metrics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("rollouts")]
    run = max((root / "runs").iterdir(), key=lambda f: int(f.name))
    train(config, resume=run)
    assert comparable(read_metrics(run)) == comparable(read_metrics(whole))
    assert same_bits(final_adapter(run), final_adapter(whole))
    for step in range(1, STEPS + 1):
        assert rollouts_file(run, step).read_bytes() == rollouts_file(whole, step).read_bytes()


@pytest.mark.slow
def test_a_run_whose_older_adapters_are_gone_is_not_resumed_with_others(root, runs, tmp_path):
    config = config_of(root, 1)
    run = shutil.copytree(runs(1), tmp_path / "run")
    shutil.rmtree(adapter_folder(run, STEPS - 1))
    with pytest.raises(InputError, match=r"no .*step_000003, from which rollouts_ahead=1 samples"):
        train(replace(config, n_grpo_steps=STEPS + 1), resume=run)


@pytest.mark.slow
def test_the_guard_knows_the_adapter_that_sampled_from_a_newer_and_an_older_one(
    runs, session, root
):
    run, learner = runs(1), new_learner(session.configs, session.policy)
    for step in (3, 4):
        lines = read_rollouts(rollouts_file(run, step), session.shared.group_size)
        rows = {0: saved_rows(session.shared, lines)}

        def gap(policy: int, rows=rows) -> float:
            one = adapters.load_all([adapter_folder(run, policy)], learner.adapters)
            return gaps_to(one, learner, rows)[0]["sampler/logprob_diff_mean"]

        assert gap(step - 2) < 1e-5
        assert min(gap(step - 3), gap(step - 1)) > 1e-3


@pytest.mark.slow
def test_the_guard_is_sure_on_some_of_the_tokens(runs, session, monkeypatch):
    """The first completions that have so many tokens, one at least."""
    lines = read_rollouts(rollouts_file(runs(1), 4), session.shared.group_size)
    rows = {0: saved_rows(session.shared, lines)}
    learner = new_learner(session.configs, session.policy)
    one = adapters.load_all([adapter_folder(runs(1), 2)], learner.adapters)
    seen, real = [], learner.update.logprobs

    def logprobs(adapters, base, batches):
        seen.extend(batches)
        return real(adapters, base, batches)

    monkeypatch.setattr(learner.update, "logprobs", logprobs)
    for tokens in (1, 12, 10**6):
        seen.clear()
        monkeypatch.setattr("jgrpo.run.probe.GUARD_TOKENS", tokens)
        assert gaps_to(one, learner, rows)[0]["sampler/logprob_diff_max"] < 1e-4
        n = sum(int((batch.mask.sum(axis=1) > 0).sum()) for batch in seen)
        lengths = np.cumsum([len(line["token_ids"]) for line in lines])
        assert n == min(32, int((lengths < tokens).sum()) + 1)


@pytest.mark.slow
def test_a_sampler_that_is_a_step_behind_ends_the_run(root, monkeypatch):
    """It has the adapter before the one that it was given."""
    real, given = JaxSampler.load, []

    def load(self, folder: Path) -> None:
        given.append(folder)
        late = folder.name.startswith("step_") and given[-2].name.startswith("step_")
        real(self, given[-2] if late else folder)

    monkeypatch.setattr(JaxSampler, "load", load)
    with pytest.raises(RunError, match=r"step 3: the completions are not the policy's"):
        train(config_of(root, 1, eval_every=0))


@pytest.mark.slow
def test_an_error_in_sampling_ahead_ends_the_run_where_it_is_needed_and_loses_nothing(
    root, runs, monkeypatch
):
    """Step 3 is sampled while step 2 is trained; that is kept, and the run goes on."""
    real = Collector.collect

    def collect(self, step, *given):
        if step == 3:
            raise RunError("the grader is gone")
        return real(self, step, *given)

    config = config_of(root, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", collect)
        with pytest.raises(
            RunError, match=r"(?s)the grader is gone.*stopped after step 2"
        ) as error:
            train(config)
    run = Path(str(error.value).split()[-1])
    train(config, resume=run)
    assert comparable(read_metrics(run)) == comparable(read_metrics(runs(1)))


@pytest.mark.slow
def test_members_run_ahead_together_as_they_do_alone(root, runs):
    configs = [config_of(root, 1), config_of(root, 1, seed=7, lora_r=2, use_dynamic_sampling=False)]
    company = train_together(configs)
    for step in range(1, STEPS + 1):
        ours, alone = (read_lines(rollouts_file(run, step)) for run in (company[0], runs(1)))
        assert [row["token_ids"] for row in ours] == [row["token_ids"] for row in alone]
        for run in company:
            assert {row["policy_step"] for row in read_lines(rollouts_file(run, step))} == {
                max(0, step - 2)
            }
    for run in company:
        assert all(row["sampler/logprob_diff_mean"] < 1e-5 for row in steps_of(run))
    with pytest.raises(InputError, match="rollouts_ahead: 1, 0"):
        train_together([configs[0], config_of(root, 0)])


@pytest.mark.slow
def test_a_step_is_replayed_with_the_adapter_that_sampled_it(runs):
    for tag, (logged, now) in replay(runs(1), 4).items():
        assert logged == now, tag


def test_sampling_goes_on_while_a_step_is_trained(monkeypatch):
    """The sampler needs 0.2 s a step, training 0.2 s: ahead they take little more than half of the
    time that they take one after the other, and the clock says who waited."""
    rollout = Rollout([], {})

    class Slow:
        def collect(self, step, screen, members, sampler):
            with screen.phase("generation"):
                time.sleep(0.2)
            return {0: rollout}

    class Sampler:
        def load(self, *folders: Path) -> None:
            pass

        def held(self):
            return self

        def close(self) -> None:
            pass

    took, waited = {}, {}
    for n_ahead in (0, 1):
        with Screen(6, live=False) as screen:
            ahead = Ahead(Slow(), Sampler(), lambda step: [Path(str(step))], screen,
                          n_ahead=n_ahead, first=0, last=6)  # fmt: skip
            start_s, waited[n_ahead] = time.perf_counter(), []
            for step in range(1, 7):
                ahead.load(step - 1)
                assert ahead.collect(step, [0]) == {0: rollout}
                assert ahead.sampling_s["time/generation"] >= 0.2
                waited[n_ahead].append(ahead.waited_s)
                time.sleep(0.2)
            took[n_ahead] = time.perf_counter() - start_s
            ahead.close()
    assert took[0] > 2.4
    assert took[1] < 2.0  # 0.2 + 6 * 0.2 and what a busy machine adds
    assert min(waited[0]) > 0.19
    assert sum(waited[1]) < 0.8


def test_the_embedded_sampler_ends_when_it_is_closed_and_the_others_do_not(session, sampler):
    held, prompts = sampler.held(), [p.prompt_ids for p in session.problems.train[:2]]
    held.close()
    with pytest.raises(RunError, match="closed before all was sampled"):
        held.sample(prompts, seeds=[1, 2])
    assert len(sampler.sample(prompts, seeds=[1, 2])) == 2


def test_the_weights_that_older_samples_need_are_on_unless_someone_asks_for_less():
    assert not Config().use_importance_weights
    assert Config(rollouts_ahead=1).use_importance_weights
    assert replace(Config(), rollouts_ahead=1).use_importance_weights
    with pytest.raises(
        InputError, match=r"rollouts_ahead=1 with use_importance_weights=False: the"
    ):
        Config(rollouts_ahead=1, use_importance_weights=False)
    with pytest.raises(InputError, match="rollouts_ahead=3: must be below n_grpo_steps=3"):
        Config(rollouts_ahead=3, n_grpo_steps=3)
    with pytest.raises(InputError, match="rollouts_ahead=1 with rollout=jax and fsdp=2"):
        Config(rollouts_ahead=1, rollout="jax", fsdp=2)
    with pytest.raises(InputError, match="rollouts_ahead=-1: must not be negative"):
        Config(rollouts_ahead=-1)
