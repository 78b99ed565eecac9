"""jgrpo.ablate on the tests' tiny model: variants on fixed rollouts against the update itself, and
a sweep that is stopped, goes on, and reports."""

import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import OWN_FUSIONS
from rich.console import Console
from safetensors.numpy import save_file
from tiny_run import tiny_config, write_base, write_config_file, write_problems

from jgrpo import cli
from jgrpo.ablate import Rollouts, as_runs, on_rollouts, show, variant_on_rollouts
from jgrpo.errors import InputError
from jgrpo.policy.adapter import adapter_arrays
from jgrpo.run.policy import open_policy
from jgrpo.run.rundir import adapter_folder, read_metrics, rollouts_file
from jgrpo.run.scoring import Scorers
from jgrpo.study import compare, fit, report, sweep
from jgrpo.study.sameness import sameness
from jgrpo.study.variants import read_variants
from jgrpo.train import train
from jgrpo.update.learner import Learner, batches_of, loss_of, parts_of, update_of

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("rank1", "no_std_norm", "clip", "token_level", "dr_grpo", "gspo", "cispo", "rloo",
         "length_penalty", "mask_truncated_completions=True", "entropy_coef=0.1")  # fmt: skip

pytestmark = pytest.mark.usefixtures("shared_compilation_cache")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    write_base(folder / "base")
    write_problems(folder)
    for file in CONFIGS.glob("*.py"):
        shutil.copy(file, folder)
    config = tiny_config(folder, expected_maximum_length=6, overlong_cache=3, n_grpo_steps=2,
                         n_eval_prompts=4, eval_every=1, checkpoint_every=1)  # fmt: skip
    write_config_file(folder / "tiny.py", config)
    return folder


@pytest.fixture(scope="module")
def run(root):
    return train(cli.load_config(root / "tiny.py"))


def quiet() -> Console:
    return Console(file=open("/dev/null", "w"), width=200)


# -- on fixed rollouts ------------------------------------------------------------------------


def compared(run: Path, policy_step: int, names=NAMES) -> tuple[compare.Comparison, tuple]:
    """The comparison, and what it was of: configs, rows, policy, adapter that sampled."""
    config = cli.resumed_config(run)
    configs = {v.name: variant_on_rollouts(v, config) for v in read_variants(names, CONFIGS)}
    lines = compare.read_rollouts(run / "rollouts/step_000002.jsonl", config.group_size)
    rows = [compare.rows_for(c, lines, Scorers(None, None)) for c in configs.values()]
    parts = configs, rows, *compare.load_adapters(run, open_policy(config), 1, policy_step)
    return compare.compare(*parts), parts


def gradients_of(run: Path, policy_step: int) -> tuple[compare.Comparison, dict]:
    """The comparison, and for each variant the gradient by Update over the same rows."""
    found, (configs, rows, policy, old) = compared(run, policy_step)
    expected = {}
    for (name, c), own in zip(configs.items(), rows, strict=True):
        update, [part] = update_of([c], policy.graph, policy.adapter, policy.base), parts_of(c, own)
        batches = batches_of(c, own, part.index)
        old_logprobs = update.logprobs(old, policy.base, batches)
        total, _ = update._sum(policy.adapter, policy.base, batches, old_logprobs, None)
        loss = float(total.metrics["loss"][0] / part.denominator)
        gradient = jax.tree.map(lambda g, d=part.denominator: g / d, total.gradient)
        flat = np.concatenate([a.ravel() for a in adapter_arrays(gradient).values()])
        expected[name] = loss, flat
    return found, expected


@pytest.mark.slow
def test_a_comparison_has_the_loss_and_gradient_of_each_variant_s_own_update(run):
    """An update after the rollouts, where they differ the most."""
    found, expected = gradients_of(run, policy_step=2)
    assert found.names == list(NAMES)
    norms = np.array([np.linalg.norm(g.astype(np.float64)) for _, g in expected.values()])
    np.testing.assert_allclose(found.grad_norm, norms, rtol=2e-4)
    np.testing.assert_allclose(found.loss, [loss for loss, _ in expected.values()], atol=2e-6)
    first = expected["rank1"][1]
    for i, (_, g) in enumerate(expected.values()):
        cosine = first @ g / np.linalg.norm(first) / np.linalg.norm(g)
        assert found.cosine[0, i] == pytest.approx(cosine, abs=1e-4)
    assert found.grad_norm.min() > 0
    assert found.cosine[0, NAMES.index("token_level")] < 0.9999  # variants do differ


@pytest.mark.slow
def test_on_policy_variants_that_cannot_differ_do_not(run):
    names = ("rank1", "clip", "gspo", "dr_grpo", "rloo")
    found, _ = compared(run, 1, names)
    for name in ("clip", "gspo"):
        assert found.cosine[0, names.index(name)] == pytest.approx(1, abs=1e-6)
    i, j = names.index("dr_grpo"), names.index("rloo")  # the same direction: sums over tokens
    assert found.cosine[i, j] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_the_command_writes_table_heat_map_and_figures(run, root):
    variants = ("rank1", "clip", "dapo")
    out = on_rollouts(Rollouts(run, step=2, variants=variants, configs=CONFIGS), quiet())
    assert out == run / "ablation" / "step_000002_policy_000001"
    assert {f.name for f in out.iterdir()} == {
        "report.md", "report.html", "cosines.png", "comparison.json",
    }  # fmt: skip
    text = (out / "report.md").read_text()
    assert all(f"| `{name}` |" in text for name in variants)
    assert "on policy" in text
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 1
    found = json.loads((out / "comparison.json").read_text())
    assert np.array(found["cosine"]).shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("rank1", "rank4")}, r"variant rank4 changes lora_r: .*saved rollouts only"),
        ({"step": 9}, "not a rollouts file"),
        ({"policy_step": 7}, "there is no .*step_000007"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, options, message):
    asked = {"step": 2, "variants": ("rank1",), "configs": CONFIGS} | options
    with pytest.raises(InputError, match=message):
        on_rollouts(Rollouts(run, **asked), quiet())


def test_a_run_s_own_techniques_are_taken_back_first(run):
    config = dataclasses.replace(cli.resumed_config(run), use_clip=True, loss_type="gspo")
    [plain] = read_variants(("rank1",), CONFIGS)
    assert loss_of(variant_on_rollouts(plain, config)).keywords == {}


def test_rollouts_with_torn_groups_are_refused(run, tmp_path):
    lines = (run / "rollouts/step_000001.jsonl").read_text().splitlines()
    (tmp_path / "torn.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(InputError, match="whole groups of 8"):
        compare.read_rollouts(tmp_path / "torn.jsonl", 8)


# -- as runs ----------------------------------------------------------------------------------


def command(root: Path, *args: str) -> cli.AblateRuns:
    fixed = ["--config", str(root / "tiny.py"), "--seeds", "0", "1", "--out", str(root / "sweep")]
    return cli.parse(cli.AblateRuns, [*fixed, *args])


@pytest.fixture(scope="module")
def swept(root):
    """Two variants that must be equal to the bit, and one that must not; then all again."""
    args = ("--variants", "clip", "token_level", "--together", "1")  # rank1 comes by itself
    asked = command(root, *args)
    folder = root / "sweep" / "token_level"
    folder.mkdir(parents=True)
    changes = {"use_token_level_loss": True, "seed": 0, "run_dir": str(folder / "seed_0")}
    with pytest.MonkeyPatch.context() as patch:  # a run that a stopped sweep has left half done
        patch.setattr(Learner, "learn", stop_at_second(Learner.learn))
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(asked.options, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", OWN_FUSIONS)
        as_runs(asked, quiet())
    return root / "sweep"


def stop_at_second(real):
    calls = []

    def learn(self, rows):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, rows)

    return learn


@pytest.mark.slow
def test_a_sweep_leaves_a_run_folder_each_and_goes_on_with_a_half_done_one(swept):
    for variant in ("rank1", "clip", "token_level"):
        for seed in (0, 1):
            rows = read_metrics(swept / variant / f"seed_{seed}")
            assert [r["step"] for r in rows if "train/loss" in r] == [1, 2]
            assert rows[-1]["eval/total"] == 4
    log = (swept / "token_level/seed_0.log").read_text()
    assert " 2/2" in log  # it went on, and did not begin again
    assert " 1/2" not in log
    manifest = json.loads((swept / "ablation.json").read_text())
    assert manifest["variants"]["clip"]["changes"] == {"use_clip": True}


@pytest.mark.slow
def test_the_report_says_what_was_found(swept):
    text = (swept / "report.md").read_text()
    [clip] = [line for line in text.splitlines() if line.startswith("| `clip` |")]
    assert "the same to the bit: says nothing" in clip
    assert "0.0 ± 0.0" in clip
    [other] = [line for line in text.splitlines() if line.startswith("| `token_level` |")]
    assert "the same" not in other
    assert "](effects.png)" in text
    page = (swept / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<table>" in page


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(swept, root):
    times = {f: f.stat().st_mtime_ns for f in swept.glob("*/*/metrics.jsonl")}
    assert len(times) == 6
    as_runs(command(root, "--variants", "rank1", "clip", "token_level"), quiet())
    assert times == {f: f.stat().st_mtime_ns for f in swept.glob("*/*/metrics.jsonl")}


@pytest.mark.slow
def test_side_by_side_a_sweep_has_the_same_runs(swept, root):
    """Six runs in two groups sample what they sample in the other sweep."""
    args = ("--variants", "clip", "token_level", "--together", "3")
    asked = dataclasses.replace(command(root, *args), out=root / "side")
    console = Console(file=io.StringIO(), width=200)
    as_runs(asked, console)
    assert "6 runs in 2 groups side by side" in console.file.getvalue()
    assert len(list((root / "side").glob("*/*/metrics.jsonl"))) == 6
    assert len(list((root / "side").glob("*/*.log"))) == 2
    for variant in ("rank1", "clip", "token_level"):
        for seed in (0, 1):
            ours, theirs = (
                read_metrics(folder / variant / f"seed_{seed}") for folder in (root / "side", swept)
            )
            for a, b in zip(ours, theirs, strict=True):
                assert a.get("train/accuracy") == b.get("train/accuracy")
                assert a.get("train/loss") == pytest.approx(b.get("train/loss"), abs=1e-5)


def test_runs_that_must_not_be_side_by_side_are_in_groups_of_their_own(root, tmp_path):
    base = command(root).options
    changes = ({}, {"lora_r": 4}, {"group_size": 4}, {"lr": 1e-4}, {"max_tokens": 5}, {"seed": 9})
    jobs = [
        sweep.Job(str(i), 0, dataclasses.replace(base, run_dir=str(tmp_path / str(i)), **own))
        for i, own in enumerate(changes)
    ]
    names = lambda most: [[j.variant for j in g] for g in sweep.groups_of(jobs, most)]  # noqa: E731
    assert names(9) == [["0", "1", "3", "5"], ["2"], ["4"]]
    assert names(3) == [["0", "1"], ["3", "5"], ["2"], ["4"]]
    (tmp_path / "3" / "checkpoints" / "000004").mkdir(parents=True)
    assert names(9) == [["0", "1", "5"], ["2"], ["3"], ["4"]]


@pytest.mark.parametrize(
    ("n_variants", "n_seeds", "most", "n_workers", "sizes", "n_kinds"),
    [
        (14, 2, 8, 1, [7] * 4, 2),
        (14, 2, 16, 1, [14] * 2, 1),
        (14, 5, 16, 2, [7] * 10, 2),  # five whole seeds would leave a worker idle at the end
        (14, 20, 16, 2, [14] * 20, 1),
        (14, 1, 16, 2, [7] * 2, 2),
        (3, 5, 8, 1, [6, 6, 3], 2),
        (5, 1, 3, 1, [3, 2], 2),
        (2, 3, 1, 2, [1] * 6, 2),
    ],
)
def test_groups_repeat_the_same_variants_so_that_they_share_programs(
    root, n_variants, n_seeds, most, n_workers, sizes, n_kinds
):
    base = command(root).options
    jobs = [
        sweep.Job(str(v), seed, dataclasses.replace(base, seed=seed))
        for seed in range(n_seeds)
        for v in range(n_variants)
    ]
    groups = sweep.groups_of(jobs, most, n_workers)
    assert [len(group) for group in groups] == sizes
    assert [job for group in groups for job in group] == jobs
    assert len({tuple(j.variant for j in group) for group in groups}) == n_kinds


@pytest.mark.slow
def test_as_many_as_fit_by_the_dry_run_s_figure_are_side_by_side(root, monkeypatch, capsys):
    base = command(root).options
    configs = [dataclasses.replace(base, seed=seed) for seed in range(4)]
    n, most, why = fit.what_fits([configs], 1, None)
    assert (n, most) == (1, 4)
    assert why.startswith("up to 4 runs side by side: training takes 0.0")
    assert fit.what_fits([configs[:1], configs[1:2]], 1, None)[1] == 1

    def needed(configs, policy, lengths):
        return SimpleNamespace(total=10 + 5 * len(configs))

    monkeypatch.setattr(fit, "training_memory", needed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    for free, asked, expected in (
        (30, (1, None), (1, 4)),
        (29, (1, None), (1, 2)),
        (30, (2, None), (2, 1)),
        (1, (1, None), (1, 1)),
        (None, (9, None), (9, 4)),
        (90, (None, None), (3, 4)),
        (45, (None, None), (3, 1)),
        (30, (None, None), (1, 4)),
        (60, (None, 3), (1, 3)),
        (1, (None, None), (1, 1)),
        (1, (2, 4), (2, 4)),
    ):
        monkeypatch.setattr(fit, "free_memory", lambda free=free: free)
        n, most, why = fit.what_fits([configs], *asked)
        assert (n, most) == expected, (free, asked)
        assert ("that are free" in why) == (free is not None)
    through_a_server = [dataclasses.replace(c, rollout="vllm") for c in configs]
    assert fit._of_use([configs]) == 3
    assert fit._of_use([through_a_server]) == 1


@pytest.mark.slow
def test_sigterm_ends_all_processes_with_a_checkpoint_each(root, tmp_path):
    words = ["--config", str(root / "tiny.py"), "--variants", "token_level", "--seeds", "0", "1",
             "2", "3", "--n_grpo_steps", "500", "--jobs", "2", "--together", "2", "--out",
             str(tmp_path)]  # two groups at a time, of four  # fmt: skip
    ablate = [sys.executable, "-m", "jgrpo.ablate", "runs", *words]
    sweeping = subprocess.Popen(
        ablate, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    folders = [tmp_path / name / f"seed_{i}" for name in ("rank1", "token_level") for i in (0, 1)]
    until(lambda: all(len(steps_of(folder)) > 1 for folder in folders), 300)
    sweeping.terminate()  # it alone: a terminal's Ctrl-C would come to all
    said, _ = sweeping.communicate(timeout=120)
    assert sweeping.returncode == 130, said
    assert "stopping: what runs leaves a checkpoint" in said
    until(lambda: not alive(sweeping.pid), 20)
    for folder in folders:
        done = steps_of(folder)[-1]
        assert done < 500
        assert (folder / "checkpoints" / f"{done:06d}").is_dir()
    assert not (tmp_path / "rank1" / "seed_2").exists()


def steps_of(folder):
    try:
        return [row["step"] for row in read_metrics(folder) if "train/loss" in row]
    except InputError:  # not begun
        return []


def alive(process_group):
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


def until(true, patience_s):
    end_s = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.2)


@pytest.mark.slow
def test_a_folder_of_another_config_is_refused(swept, root):
    with pytest.raises(InputError, match=r"seed_0 is of a run with another lr; .*--out"):
        as_runs(command(root, "--variants", "rank1", "--lr", "0.5"), quiet())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--eval_every", "0"], "eval_every=0"),
        (["--jobs", "0"], "--jobs must be 1"),
        (["--together", "0"], "--jobs must be 1 or more, as --together"),
        (["--variants", "cispo+clip"], "use_clip with loss_type=cispo"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_starts(root, args, message, tmp_path):
    asked = command(root, "--variants", "rank1", *args)
    with pytest.raises(InputError, match=message):
        as_runs(dataclasses.replace(asked, out=tmp_path / "new"), quiet())
    assert not (tmp_path / "new").exists()


def test_the_command_line_says_what_it_can_do():
    ablate = [sys.executable, "-m", "jgrpo.ablate"]
    done = subprocess.run([*ablate, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "rollouts RUN" in done.stdout
    done = subprocess.run([*ablate, "run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'run' is neither rollouts nor runs" in done.stderr
    done = subprocess.run(ablate, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: say what: rollouts or runs\nusage: ")
    assert "ablate runs --config configs/tiny.py --variants rank4" in done.stderr


# -- statistics -------------------------------------------------------------------------------


def fake(final: float, **others) -> report.Run:
    fields = {"steps": [0, 1], "accuracy": [0.0, final], "folder": Path()}
    fields |= dict.fromkeys(("generated_tokens", "trained_tokens", "seconds"), 1.0)
    return report.Run(**(fields | others))


def test_an_interval_by_hand():
    # n = 5: mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776445; half = t s / sqrt 5 = 1.963243.
    interval = report.Interval.of([1, 2, 3, 4, 5])
    assert interval.mean == 3
    assert interval.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert math.isnan(report.Interval.of([1.0]).half)


def test_the_seeds_that_an_interval_would_take_by_hand():
    # s = 1, so t(n - 1) / sqrt(n) <= 0.5: 2.10092 / sqrt 19 = 0.482, 2.10982 / sqrt 18 = 0.497 and
    # 2.11991 / sqrt 17 = 0.514.
    interval = report.Interval.of([-1.0, 0.0, 1.0])
    assert interval.seeds_for(0.5) == 18
    assert interval.seeds_for(interval.half * 1.0001) == 3


def test_differences_are_paired_by_seed():
    # Each seed gains 0.1 exactly: unpaired, the seeds' own spread would hide it.
    a = {s: fake(0.5 + 0.1 * s) for s in range(3)}
    b = {s: fake(0.4 + 0.1 * s) for s in range(3)}
    gain = report.paired(a, b, "final")
    assert gain.mean == pytest.approx(0.1)
    assert gain.half < 1e-9


@pytest.mark.parametrize(
    ("gain", "half", "says"),
    [
        (0.1, 0.05, "contradicts: it gains more than 2 points"),
        (0.0, 0.01, "supports: no gain above 2 points"),
        (0.01, 0.05, "undecided"),
        (-0.1, 0.05, "supports: it is worse"),
    ],
)
def test_verdicts(gain, half, says):
    flat = report.Interval(0.0, 0.1, 5)
    assert report.verdict(report.Interval(gain, half, 5), flat, "", 0.02).startswith(says)
    same = report.verdict(report.Interval(gain, half, 5), flat, "to rounding", 0.02)
    assert same == "the same to rounding: says nothing about the technique"


def test_an_undecided_row_says_how_many_seeds_it_would_take():
    # s = 0.05 sqrt 5 / 2.776445 = 0.040268; t(n - 1) s / sqrt n is 0.02003 at 18, 0.01941 at 19.
    says = report.verdict(report.Interval(0.0, 0.05, 5), report.Interval(0.0, 0.1, 5), "", 0.02)
    assert says == "undecided: ± 2 points would take about 19 seeds"


def test_an_undecided_row_of_a_narrow_interval_asks_for_no_fewer_seeds_than_it_has():
    says = report.verdict(report.Interval(0.009, 0.013, 10), report.Interval(0, 0.1, 10), "", 0.02)
    assert says == "undecided by little: 2 points lie in its interval"


def ended(run_dir: Path, *adapters, tokens=(1, 2, 3)) -> Path:
    """A run folder: a step's adapter for each, from zeros, and a completion of one token each."""
    for step, values in enumerate((np.zeros_like(adapters[0]), *adapters)):
        (folder := adapter_folder(run_dir, step)).mkdir(parents=True)
        save_file({"a": np.array(values, np.float64)}, folder / "adapter_model.safetensors")
    (run_dir / "rollouts").mkdir()
    for step, token in enumerate(tokens[: len(adapters)], start=1):
        line = {"token_ids": [token], "sampler_logprobs": [-1.0 / len(str(run_dir))]}
        rollouts_file(run_dir, step).write_text(json.dumps(line) + "\n")
    return run_dir


def test_runs_are_the_same_to_the_bit_to_rounding_or_not(tmp_path):
    """Apart by less than a thousandth of the way that training has taken (5: 3 and 4, then 10)."""
    way = ([3.0, 4.0], [6.0, 8.0], [6.0, 8.0])
    reference = {seed: ended(tmp_path / f"reference_{seed}", *way) for seed in (0, 1)}
    near = ([3.0, 4.0], [6.0, 8.0 + 1e-5], [6.0, 8.0])
    token = "to rounding, until a token fell otherwise (in 1 of 2 seeds)"
    for i, (says, adapters, others) in enumerate((
        ("to the bit", way, {}),
        ("to rounding", near, {}),
        ("", ([3.0, 4.0], [6.0, 8.011], [6.0, 8.0]), {}),
        (token, (*near[:2], [60.0, 80.0]), {"tokens": (1, 2, 4)}),
        ("", ([3.0, 4.0], [60.0, 80.0]), {"tokens": (1, 4)}),  # one step cannot show it
        ("", ([3.0], [6.0]), {}),  # another rank
    )):  # fmt: skip
        first = ended(tmp_path / f"{i}_0", *way)
        row = {0: first, 1: ended(tmp_path / f"{i}_1", *adapters, **others)}
        assert sameness(row, reference) == says, (i, says)
    assert sameness({0: first}, reference) == ""
    still = ended(tmp_path / "still", [0.0, 0.0], [0.0, 0.0])
    assert sameness({0: first}, {0: still}) == ""
    assert sameness({0: still}, {0: still}) == "to the bit"


def test_equal_rows_get_equal_verdicts_and_one_row_is_the_reference(tmp_path):
    results = {
        name: {
            seed: fake(
                0.5, folder=ended(tmp_path / f"{name}_{seed}", [3.0, 4.0 + apart], [6.0, 8.0])
            )
            for seed in range(3)
        }
        for name, apart in (("rank1", 0.0), ("bit", 0.0), ("rounding", 1e-6))
    }
    _, rows = report.results_table(results, dict.fromkeys(results, "rank1"), 0.02)
    assert [row[-1] for row in rows] == [
        "the reference",
        "the same to the bit: says nothing about the technique",
        "the same to rounding: says nothing about the technique",
    ]


def test_names_are_whole_at_80_columns():
    console = Console(file=io.StringIO(), width=80)
    name = "four_updates+use_importance_weights=True"
    says = "undecided: ± 2 points would take about 19 seeds; learns later"
    show(console, ["variant", "final accuracy, %", "final, points", "verdict"],
         [[f"`{name}`", "88.7 ± 5.9", "+2.7 ± 2.5", says]])  # fmt: skip
    lines = console.file.getvalue().splitlines()
    assert any(name in line for line in lines)
    assert max(map(len, lines)) <= 80
    start = next(line.index("verdict") for line in lines if "verdict" in line)
    last = "".join(line[start:] for line in lines).replace("─", "")
    assert last.replace(" ", "") == "verdict" + says.replace(" ", "")


@pytest.mark.parametrize("width", [50, 80, 120])
def test_numbers_are_whole_where_there_is_room_and_complete_where_not(width):
    console = Console(file=io.StringIO(), width=width)
    header = ["variant", "loss", "|gradient|", "cosine to rank1", "clipped tokens, %", "KL, nats"]
    row = ["`loss_type=reinforce`", "-0.078196", "0.433089", "1.000000", "0.00", "1.54e-14"]
    show(console, header, [row])
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        assert all(number in text.splitlines()[-2] for number in row[1:])
    assert sum(map(text.count, "0123456789")) == sum(
        c.isdecimal() for c in "".join([*header, *row])
    )


@pytest.mark.slow
def test_seconds_and_tokens_are_those_of_the_run(swept):
    folder = swept / "rank1" / "seed_1"
    rows, found = read_metrics(folder), report.read_run(folder)
    assert found.generated_tokens == sum(r.get("tokens/generated", 0) for r in rows)
    assert found.steps == [0, 1, 2]
    assert found.final == rows[-1]["eval/accuracy"]
    assert found.mean == pytest.approx(np.mean([r["eval/accuracy"] for r in rows
                                                if "eval/total" in r][1:]))  # fmt: skip


def test_jobs_are_planned_seed_by_seed(root):
    asked = command(root)
    variants = read_variants(("rank1", "clip"), CONFIGS)
    jobs = sweep.plan(asked.options, variants, (3, 4), root / "other")
    assert [(j.seed, j.variant) for j in jobs] == [
        (3, "rank1"), (3, "clip"), (4, "rank1"), (4, "clip"),
    ]  # fmt: skip
    assert jobs[1].config.run_dir == str(root / "other/clip/seed_3")
