"""jgrpo.run.probe: the probe must catch every sampler that does not follow the adapter, and the
embedded sampler must pass it; and the text that is graded."""

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import tiny_config
from transformers import AutoConfig, Qwen3ForCausalLM

from jgrpo.config import PROJECTIONS
from jgrpo.errors import RunError
from jgrpo.policy.lora import nth
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.rollout.protocol import Completion
from jgrpo.run import probe as probe_module
from jgrpo.run import session
from jgrpo.run.policy import Policy, open_policies
from jgrpo.run.probe import check_sampler, gap_problem
from jgrpo.run.rundir import read_metrics
from jgrpo.run.sampler import open_sampler
from jgrpo.run.session import open_problems
from jgrpo.train import train

BLOCK = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in PROJECTIONS}


@pytest.fixture(autouse=True, scope="module")
def configured():
    session.configure_jax()


def open_parts(config):
    policy, problems = open_policies([config]), open_problems(config)
    return config, policy, problems, open_sampler(config, policy, problems.stop_token_ids, "t")


@pytest.fixture(scope="module")
def parts(root):
    """Config, policy, problems and sampler, rank 2 so that alpha and alpha / r differ."""
    return open_parts(tiny_config(root, lora_r=2, lora_alpha=4))


def probe(parts, folder: Path) -> dict[str, float]:
    config, policy, problems, sampler = parts
    return check_sampler([config], policy, sampler, problems, [folder / "probe"])


def edit(monkeypatch, change) -> None:
    """Have the sampler read what `change` makes of the adapter's arrays."""
    real = JaxSampler.load

    def load(self, folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        arrays = load_file(file)
        save_file({key: change(key, array) for key, array in arrays.items()}, file)
        real(self, folder)

    monkeypatch.setattr(JaxSampler, "load", load)


def test_a_sampler_that_follows_the_adapter_passes(parts, tmp_path):
    gaps = probe(parts, tmp_path)
    assert gaps["probe/gap_max"] < 1e-4 < 0.05 < gaps["probe/gap_to_base_mean"]


def test_the_trainer_s_side_of_the_probe_is_one_program(parts, tmp_path, monkeypatch):
    """The prompts begin with the same token, after which the probe cuts them: still four."""
    real, shapes = Policy.logprobs, set()

    def logprobs(self, e, adapter, batch, temperature):
        shapes.add(tuple(x.shape for x in batch))
        return real(self, e, adapter, batch, temperature)

    monkeypatch.setattr(Policy, "logprobs", logprobs)
    assert len({p.prompt_ids[0] for p in parts[2].train}) == 1
    probe(parts, tmp_path)
    assert len(shapes) == 1


def test_the_probe_leaves_the_policy_alone(parts, tmp_path):
    before = str(parts[1].adapter)
    probe(parts, tmp_path)
    assert str(parts[1].adapter) == before
    written = json.loads((tmp_path / "probe/probe_1/adapter_config.json").read_text())
    assert written["r"] == 2
    assert written["lora_alpha"] == 4


def test_a_sampler_that_ignores_the_adapter_is_caught(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(JaxSampler, "load", lambda self, folder: None)
    config, policy, problems, _ = parts
    fresh = open_sampler(config, policy, problems.stop_token_ids, "t")
    with pytest.raises(RunError, match="does not follow the adapter"):
        check_sampler([config], policy, fresh, problems, [tmp_path / "probe"])


def test_a_probe_that_hardly_moves_what_is_sampled_is_made_larger(root, tmp_path, monkeypatch):
    """In 16 bits a right sampler misses such a one by as much as one that ignores it (through vLLM
    9 of 20 seeds of the quick start's model were refused)."""
    monkeypatch.setattr(probe_module, "PROBE_SHIFT_NATS", 0.01)
    parts = open_parts(tiny_config(root, dtype="bfloat16"))
    gaps = probe(parts, tmp_path)
    assert gaps["probe/gap_to_base_mean"] > 0.1
    assert gaps["probe/rounding"] < 0.02
    assert {"probe_1", "probe_2"} <= {f.name for f in (tmp_path / "probe").iterdir()}
    monkeypatch.setattr(JaxSampler, "load", lambda self, folder: None)
    fresh = open_sampler(parts[0], parts[1], parts[2].stop_token_ids, "t")
    with pytest.raises(RunError, match="does not follow the adapter"):
        probe((*parts[:3], fresh), tmp_path)


def test_a_sampler_that_mixes_two_members_up_is_caught(root, tmp_path, monkeypatch):
    """They have one config, and a probe adapter each."""
    configs = [tiny_config(root)] * 2
    policy, problems = open_policies(configs), open_problems(configs[0])
    sampler = open_sampler(configs[0], policy, problems.stop_token_ids, "t")
    folders = [tmp_path / name for name in ("first", "second")]
    gaps = check_sampler(configs, policy, sampler, problems, folders)
    assert gaps["probe/gap_max"] < 1e-4
    real = JaxSampler.load
    monkeypatch.setattr(JaxSampler, "load", lambda self, *folders: real(self, *folders[::-1]))
    with pytest.raises(RunError, match=r"member 0: the sampler does not follow the adapter"):
        check_sampler(configs, policy, sampler, problems, folders)


def test_a_sampler_that_forgets_to_divide_by_the_rank_is_caught(parts, tmp_path, monkeypatch):
    edit(monkeypatch, lambda key, x: x * 2 if "lora_B" in key else x)
    with pytest.raises(RunError, match="sampler"):
        probe(parts, tmp_path)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_sampler_that_drops_one_projection_of_one_layer_is_caught(
    name, parts, tmp_path, monkeypatch
):
    edit(monkeypatch, lambda key, x: x * 0 if f"layers.1.{BLOCK[name]}.{name}" in key else x)
    with pytest.raises(RunError, match="sampler"):
        probe(parts, tmp_path)


def test_in_float32_the_probe_sees_a_scale_that_is_five_percent_off(parts, tmp_path, monkeypatch):
    edit(monkeypatch, lambda key, x: x * 0.95 if "lora_B" in key else x)
    with pytest.raises(RunError, match="does not follow the adapter"):
        probe(parts, tmp_path)


def raw_logprobs(monkeypatch, policy) -> None:
    """Have the sampler give logprobs before the temperature, as vLLM does by itself."""
    real_sample = JaxSampler.sample

    def sample(self, prompts, **options):
        groups = real_sample(self, prompts, **options)
        flat = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
        both = [list(p) for p, _ in flat], [c.token_ids for _, c in flat]
        raw = iter(probe_module._logprobs(policy, 0, nth(self.adapter, 0), *both, 1.0).tolist())
        return [
            [replace(c, logprobs=[next(raw) for _ in c.logprobs]) for c in group]
            for group in groups
        ]

    monkeypatch.setattr(JaxSampler, "sample", sample)


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [("float32", 1.5), pytest.param("bfloat16", 0.5, marks=pytest.mark.slow)],
)
def test_logprobs_from_before_the_temperature_are_caught(
    dtype, temperature, root, tmp_path, monkeypatch
):
    parts = open_parts(tiny_config(root, dtype=dtype, temperature=temperature))
    probe(parts, tmp_path)
    raw_logprobs(monkeypatch, parts[1])
    with pytest.raises(RunError, match="processed_logprobs"):
        probe(parts, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_probe_works_on_fresh_random_weights(dtype, root, tmp_path):
    """As transformers makes them: logits so small that no adapter can shift them by 0.3 nats."""
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    config = AutoConfig.from_pretrained(base)
    Qwen3ForCausalLM(config).save_pretrained(base)
    parts = open_parts(tiny_config(root, model_id=str(base), dtype=dtype))
    gaps = probe(parts, tmp_path)
    assert gaps["probe/gap_mean"] < gaps["probe/gap_to_base_mean"] / 10 < 0.03


def test_a_model_that_nothing_can_change_is_told(root, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    arrays = load_file(base / "model.safetensors")
    save_file({key: x * 0 for key, x in arrays.items()}, base / "model.safetensors")
    with pytest.raises(RunError, match="are its weights all zero"):
        probe(open_parts(tiny_config(root, model_id=str(base))), tmp_path)


def test_a_completion_s_text_ends_before_the_end_token_and_keeps_the_others(parts):
    problems = parts[2]
    ids = problems.tokenizer.get_vocab()
    words = ["\\boxed", "{", "1", "<|im_start|>", "2", "}"]
    tokens = [ids[w] for w in words]
    cut = Completion(tokens, [0.0] * 6, "length")
    whole = Completion([*tokens, ids["<|im_end|>"]], [0.0] * 7, "stop")
    assert problems.text(cut) == problems.text(whole) == "".join(words)


def test_the_grader_s_workers_end_with_the_stack(root):
    with ExitStack() as stack:
        grader = session.open_grader(tiny_config(root), stack)
        assert grader.grade([["\\boxed{7}", "\\boxed{8}"]], ["7"]).correct.tolist() == [[1.0, 0.0]]


# -- the gap at each step ---------------------------------------------------------------------


def gap(mean: float, largest: float = 9.0) -> dict[str, float]:
    return {"sampler/logprob_diff_mean": mean, "sampler/logprob_diff_max": largest}


@pytest.mark.parametrize(
    ("dtype", "limit", "fine", "wrong"),
    [("float32", None, 1e-5, 0.01), ("bfloat16", None, 0.1, 0.3), ("float32", 0.5, 0.4, 0.6)],
)
def test_a_gap_that_the_dtype_does_not_explain_is_told_with_its_causes(
    dtype, limit, fine, wrong, root
):
    config = tiny_config(root, dtype=dtype, max_mean_logprob_diff=limit)
    assert gap_problem(gap(fine), config) is None
    assert gap_problem(gap(math.nan), config) is None  # the learner's own trouble
    told = gap_problem(gap(wrong), config)
    for words in (f"{wrong} on average", "9 at most", "base model", "stale", "temperature",
                  "raise --max_mean_logprob_diff"):  # fmt: skip
        assert words in told


@pytest.mark.slow
def test_a_step_whose_samples_are_another_policy_s_is_not_kept(root, monkeypatch):
    """The sampler keeps adapter 1 for ever; steps 1 and 2 are right."""
    real = JaxSampler.load

    def load(self, folder: Path) -> None:
        if folder.name <= "step_000001" or folder.name.startswith("probe"):
            real(self, folder)

    monkeypatch.setattr(JaxSampler, "load", load)
    config = tiny_config(root, lr=2e-2, n_grpo_steps=3, eval_every=0)
    with pytest.raises(RunError, match=r"step 3: the completions are not the policy's") as error:
        train(config)
    run = Path(str(error.value).split()[-1])
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    assert sorted(f.stem for f in (run / "rollouts").iterdir()) == ["step_000001", "step_000002"]
    assert [f.name for f in sorted((run / "adapters").iterdir())][-1] == "step_000002"
    assert "stopped after step 2" in str(error.value)
