"""Do jgrpo and the PyTorch baseline compute the same? For every technique that the two share: loss,
gradient norm, the adapter's gradient, and the adapter after 10 updates, on the same rollouts.

    python benchmarks/agreement.py [--run RUN] [--only clip] [--out FILE]

Both work in float32; the judge is the baseline in float64. What is off policy is measured off
policy: old_logprobs come from the adapter that sampled, the policy is a later adapter of the run.
The last line on stdout is one JSON document; the exit status is 1 if anything is further from the
judge than rounding explains. Takes ten minutes of two cores, most of it compilation.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tyro
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from torch_baseline import Baseline, adapter_weights, advantages_of, load_adapter, open_model

from jgrpo.advantages import group_advantages, leave_one_out
from jgrpo.cli import resumed_config
from jgrpo.config import Config, load_config
from jgrpo.errors import InputError, RunError, exit_status
from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import Rows
from jgrpo.run.session import Policy, configure_jax, open_policy
from jgrpo.study.compare import saved_rows
from jgrpo.train import train
from jgrpo.update.learner import Learner, needs_base

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
TINY_RUN = {
    "n_grpo_steps": 6, "n_prompts_per_step": 4, "eval_every": 0, "micro_batch_size": 16,
    "max_tokens": 28, "temperature": 3.0, "use_length_penalty": True,
    "expected_maximum_length": 28, "overlong_cache": 20,
}  # fmt: skip
"""The base is sure of most tokens: sampled hot, more of them have ratios that are not 1. Some
completions are cut off, and a reward by length leaves few groups without signal."""
MICRO_BATCH_SIZE = 16
"""Of the baseline here: it changes time alone, and 2, the study's, takes six times as long."""
GAP_NATS = 0.1
"""Noise on the sampler's logprobs: the embedded sampler's equal the trainer's, and importance
weights of 1 would compare nothing."""

# float32 rounds to 6e-8. A loss is a mean of terms of size 1 (it is compared absolutely, since
# advantages cancel in it), each exp(logprob - old) with logprobs rounded to 1e-6; a gradient adds
# a backward pass whose sums cancel.
MAX_LOSS_ERROR = 1e-5
MAX_GRADIENT_ERROR = 1e-4
# Adam divides by sqrt(v), so that an entry whose gradient is nearly 0 moves by lr in the direction
# of its rounding error; and a token at the edge of a clip may fall on either side.
MAX_MOVEMENT_ERROR = 1e-2

NARROW = {"use_clip": True, "clip_eps": 0.02}
"""Ratios here are 1 % to 20 % from 1, so that 0.2 would clip next to nothing."""
KL = {"use_kl_penalty": True, "beta": 0.2}
BASE = KL | {"kl_to": "base"}
TOKENS = {"use_token_level_loss": True}
NO_STD = {"use_std_norm": False}
DR_GRPO = {"loss_type": "dr_grpo", **NO_STD}
GSPO = {"loss_type": "gspo", "use_clip": True, "clip_eps": 3e-3, "clip_eps_high": 4e-3}
CISPO = {"loss_type": "cispo", "cispo_max_ratio": 1.03}
RLOO = {"loss_type": "rloo", "use_leave_one_out": True, **NO_STD}
WEIGHTS = {"use_importance_weights": True, "importance_weight_cap": 1.1}
ENTROPY = {"entropy_coef": 0.05}
MASKED = {"mask_truncated_completions": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "grpo, one update a rollout": {"updates_per_epoch": 1},
    "grpo": {},
    "grpo, 2 epochs of 2 updates": {"updates_per_epoch": 2, "epochs_per_step": 2},
    "temperature 0.7": {"temperature": 0.7},
    "no std": NO_STD,
    "leave-one-out advantages": {"use_leave_one_out": True},
    "clip": NARROW,
    "clip-higher": NARROW | {"clip_eps_high": 0.05},
    "KL to old, k1": KL | {"kl_estimator": "k1"},
    "KL to old, k2": KL | {"kl_estimator": "k2"},
    "KL to old, k3": KL,
    "KL to base, k1": BASE | {"kl_estimator": "k1"},
    "KL to base, k2": BASE | {"kl_estimator": "k2"},
    "KL to base, k3": BASE,
    "token level": TOKENS,
    "token level + clip": TOKENS | NARROW,
    "Dr. GRPO": DR_GRPO,
    "Dr. GRPO + clip + KL to base": DR_GRPO | NARROW | BASE,
    "GSPO": GSPO,
    "GSPO + token level": GSPO | TOKENS,
    "CISPO": CISPO,
    "RLOO": RLOO,
    "RLOO + clip": RLOO | {"use_clip": True, "clip_eps": 0.1},
    "importance weights": WEIGHTS,
    "importance weights + clip + token level": WEIGHTS | NARROW | TOKENS,
    "CISPO + importance weights": CISPO | WEIGHTS,
    "entropy bonus": ENTROPY,
    "mask truncated": MASKED,
    "mask truncated + token level": MASKED | TOKENS,
    "DAPO: clip-higher + token level + mask": NARROW | {"clip_eps_high": 0.05} | TOKENS | MASKED,
    "clip + KL to base + entropy + weights": NARROW | BASE | ENTROPY | WEIGHTS,
}
"""What changes; four updates a rollout where nothing else is said."""

Lines = list[dict]
Arrays = dict[str, np.ndarray]


@dataclass
class Args:
    """Compare losses, gradients and adapters of jgrpo with those of the PyTorch baseline."""

    run: Path | None = None
    """Run folder of jgrpo.train, in float32, of 5 steps or more; without it a small run of
    configs/tiny.py is made, in a temporary folder."""
    only: str = ""
    """Compare the variants with this in their names alone."""
    updates: int = 10
    """Optimizer updates after which the adapters are compared; 0: gradients alone."""
    out: Path | None = None
    """File for the Markdown table; without it, stdout."""


@dataclass(frozen=True)
class Setting:
    """What both sides are given: rollouts, the adapter that sampled the first, and a later one."""

    config: Config
    rollouts: list[Lines]
    old: Path
    policy: Path


@dataclass(frozen=True)
class Measured:
    """What one side says about one variant."""

    loss: float
    norm: float
    gradient: Arrays
    moved: Arrays


# -- the setting ---------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(run: Path | None) -> Iterator[Setting]:
    """A run's, or that of a small run made now."""
    if run is not None:
        yield read_setting(run)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = replace(load_config(TINY), run_dir=str(Path(folder) / "run"), **TINY_RUN)
        with contextlib.redirect_stdout(sys.stderr):
            yield read_setting(train(config))


def read_setting(run: Path) -> Setting:
    """The policy is the run's last adapter; the first rollout is that of two steps before, so that
    old and new are three adapters apart; the other rollouts are all the run's, in turn."""
    config = resumed_config(run)
    if config.dtype != "float32":
        raise InputError(f"{run} is in {config.dtype}; only a run in float32 can be compared")
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    if len(files) < 5:
        raise InputError(f"{run} has {len(files)} rollouts; 5 are needed")
    rng = np.random.default_rng(0)
    rollouts = [[with_noise(json.loads(line), rng) for line in file.open()] for file in files]
    rollouts = [without_signal(lines, config.group_size) for lines in rollouts]
    first = len(files) - 3
    folder = run / "adapters"
    return Setting(
        config,
        rollouts[first:] + rollouts[:first],
        folder / f"step_{first:06d}",
        folder / f"step_{len(files):06d}",
    )


def with_noise(line: dict, rng: np.random.Generator) -> dict:
    noise = rng.normal(0, GAP_NATS, len(line["token_ids"]))
    return line | {"sampler_logprobs": (np.array(line["sampler_logprobs"]) + noise).tolist()}


def without_signal(lines: Lines, group_size: int) -> Lines:
    """The first group with equal rewards: jgrpo leaves such rows out, the study does not."""
    return [line | {"reward": 0.0} for line in lines[:group_size]] + lines[group_size:]


def with_advantages(lines: Lines, advantages: np.ndarray) -> Lines:
    return [line | {"advantage": float(a)} for line, a in zip(lines, advantages.flat, strict=True)]


def rewards_of(lines: Lines, config: Config) -> np.ndarray:
    """float32 [P, G]"""
    rewards = np.array([line["reward"] for line in lines], np.float32)
    return rewards.reshape(-1, config.group_size)


def variant_config(config: Config, changes: dict[str, Any]) -> Config:
    return replace(config, **{"updates_per_epoch": 4, **changes})


def whole_rollout(config: Config) -> Config:
    """The config with all rows in one update; two epochs, where it makes several updates, since
    that is how jgrpo knows that ratios will leave 1."""
    off_policy = config.updates_per_rollout > 1
    return replace(config, updates_per_epoch=1, epochs_per_step=2 if off_policy else 1)


# -- jgrpo ---------------------------------------------------------------------------------------

KEEP_GRADIENT = optax.GradientTransformation(
    lambda adapter: jax.tree.map(jnp.zeros_like, adapter),
    lambda gradient, state, _=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)
"""An optimizer that stands still and keeps the last gradient as its state."""


class Ours:
    """jgrpo in float32."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.model: Policy = open_policy(setting.config)

    def rollout(self, lines: Lines, config: Config) -> Rows:
        of = leave_one_out if config.use_leave_one_out else group_advantages
        advantages = of(rewards_of(lines, config), config.use_std_norm)
        return saved_rows(config, with_advantages(lines, advantages))

    def moved(self, config: Config, rollouts: Iterable[Rows]) -> Arrays:
        """How far learning from the rollouts moves the adapter."""
        start = self.adapter(self.setting.policy)
        before = adapters.adapter_arrays(start)
        learner = Learner(config, self.model.graph, start, self.model.base)
        for rows in rollouts:
            learner.learn(rows)
        return difference(adapters.adapter_arrays(learner.state[0]), before)

    def gradient(self, config: Config, rows: Rows) -> tuple[float, float, Arrays]:
        """Loss, norm and gradient of one update on the whole rollout."""
        policy, base = self.adapter(self.setting.policy), self.model.base
        learner = Learner(config, self.model.graph, policy, base)
        update, [part] = learner.update, learner.parts(rows)
        update.optimizer = KEEP_GRADIENT
        old = ref = None
        if config.updates_per_rollout > 1:
            old = update.logprobs(self.adapter(self.setting.old), base, part.batches)
        if needs_base(config):
            off = jax.tree.map(jnp.zeros_like, policy)
            ref = update.logprobs(off, base, part.batches)
        state = KEEP_GRADIENT.init(policy)
        _, gradient, metrics, _ = update(
            policy, state, base, part.batches, part.denominator, old, ref
        )
        loss, norm = (float(metrics[f"train/{name}"]) for name in ("loss", "grad_norm"))
        return loss, norm, adapters.adapter_arrays(gradient)

    def adapter(self, folder: Path):
        """A new copy each time: an update consumes its adapter."""
        return adapters.load(folder, self.model.adapter)


# -- torch -----------------------------------------------------------------------------------------


class Theirs:
    """The baseline in float32, or in float64 as the judge."""

    def __init__(self, setting: Setting, dtype: torch.dtype):
        self.setting = setting
        judge = dtype == torch.float64
        self.model = open_judge(setting) if judge else open_model(setting.config, setting.policy)

    def rollout(self, lines: Lines, config: Config) -> Lines:
        rewards = torch.tensor(rewards_of(lines, config), dtype=torch.float64)
        return with_advantages(lines, advantages_of(rewards, config).numpy())

    def moved(self, config: Config, rollouts: Iterable[Lines]) -> Arrays:
        """How far learning from the rollouts moves the adapter."""
        baseline = self.baseline(config, self.setting.policy)
        before = arrays_of(baseline.weights)
        for lines in rollouts:
            baseline.learn(lines)
        return difference(arrays_of(baseline.weights), before)

    def gradient(self, config: Config, lines: Lines) -> tuple[float, float, Arrays]:
        """Loss, norm and gradient of one update on the whole rollout."""
        off_policy = config.updates_per_rollout > 1
        before = self.setting.old if off_policy else self.setting.policy
        baseline = self.baseline(config, before)
        batch = baseline.with_others(baseline.batch(lines))
        load_adapter(self.model, self.setting.policy)
        loss = baseline.backward(batch)
        gradient = arrays_of(baseline.gradient())
        return loss, norm_of(gradient), gradient

    def baseline(self, config: Config, adapter: Path) -> Baseline:
        load_adapter(self.model, adapter)
        return Baseline(config, self.model, MICRO_BATCH_SIZE)

    def ratios(self) -> np.ndarray:
        """exp(logprob - old) of the first rollout's tokens."""
        baseline = self.baseline(self.setting.config, self.setting.old)
        batch = baseline.with_others(baseline.batch(self.setting.rollouts[0]))
        load_adapter(self.model, self.setting.policy)
        return (baseline.all_logprobs(batch) - batch.old).exp()[batch.mask > 0].numpy()


def arrays_of(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: t.detach().cpu().double().numpy().copy() for name, t in tensors.items()}


def open_judge(setting: Setting) -> PeftModel:
    """The baseline's model with everything in float64."""
    model = open_model(setting.config, setting.policy, torch.float64)
    in_float64(model)
    assert all(w.dtype == torch.float64 for w in adapter_weights(model).values())
    return model


def in_float64(model: nn.Module) -> None:
    """All in float64, also norms and rotary angles, which transformers computes in float32 whatever
    the model's type; with them as they are the model could not judge float32."""

    def norm(module, x):
        scale = (x.square().mean(dim=-1, keepdim=True) + module.variance_epsilon).rsqrt()
        return module.weight * x * scale

    def rotary(module, x, position_ids):
        angles = (position_ids[..., None] * module.inv_freq).repeat(1, 1, 2)
        return tuple(f(angles) * module.attention_scaling for f in (torch.cos, torch.sin))

    model.double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = norm.__get__(module)
        elif hasattr(module, "inv_freq"):
            if module.rope_type == "default":  # the others come out of float32 code as they are
                width = 2 * len(module.inv_freq)
                powers = torch.arange(0, width, 2, dtype=torch.float64) / width
                module.inv_freq = module.config.rope_parameters["rope_theta"] ** -powers
            module.forward = rotary.__get__(module)


# -- comparison ------------------------------------------------------------------------------------


def measured(side: Ours | Theirs, config: Config, updates: int) -> Measured:
    """All of one side's figures on one variant; `updates` is rounded up to whole rollouts."""
    rollouts = [side.rollout(lines, config) for lines in side.setting.rollouts]
    of_one_update = side.gradient(whole_rollout(config), rollouts[0])
    n_rollouts = -(-updates // config.updates_per_rollout)
    return Measured(*of_one_update, side.moved(config, islice(cycle(rollouts), n_rollouts)))


def difference(a: Arrays, b: Arrays) -> Arrays:
    return {name: a[name] - b[name] for name in a}


def norm_of(arrays: Arrays) -> float:
    return float(np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in arrays.values())))


def relative_error(got: Arrays, expected: Arrays) -> float:
    """|got - expected| / |expected|, over all tensors."""
    assert got.keys() == expected.keys()
    return norm_of(difference(got, expected)) / max(norm_of(expected), 1e-30)


def cosine(a: Arrays, b: Arrays) -> float:
    dot = sum(float((a[k].astype(np.float64) * b[k]).sum()) for k in a)
    return dot / (norm_of(a) * norm_of(b))


@dataclass(frozen=True)
class Row:
    """One variant: the judge's figures, and how far the two float32 systems are from them (loss:
    absolutely; norm, gradient, movement: relatively)."""

    variant: str
    loss: float
    grad_norm: float
    effect: float
    """How far the judge's gradient is from that of plain grpo on the same rows, relatively."""
    loss_error: float
    loss_error_torch: float
    norm_error: float
    norm_error_torch: float
    gradient_error: float
    gradient_error_torch: float
    one_minus_cosine: float
    """Of jgrpo's gradient and float32 torch's."""
    movement_error: float
    movement_error_torch: float

    def problems(self) -> list[str]:
        limits = {"loss": MAX_LOSS_ERROR, "norm": MAX_GRADIENT_ERROR,
                  "gradient": MAX_GRADIENT_ERROR, "movement": MAX_MOVEMENT_ERROR}  # fmt: skip
        return [
            f"{self.variant}: {name}{side} is off by {error:.1e}, more than {limit:.0e}"
            for name, limit in limits.items()
            for side in ("_error", "_error_torch")
            if not (error := getattr(self, name + side)) <= limit
        ]


def compared(name: str, ours: Measured, theirs: Measured, judge: Measured, plain: Measured) -> Row:
    def errors(m: Measured) -> tuple[float, float, float, float]:
        return (
            abs(m.loss - judge.loss),
            abs(m.norm - judge.norm) / judge.norm,
            relative_error(m.gradient, judge.gradient),
            relative_error(m.moved, judge.moved),
        )

    pairs = [x for pair in zip(errors(ours), errors(theirs), strict=True) for x in pair]
    effect = relative_error(judge.gradient, plain.gradient)
    angle = 1 - cosine(ours.gradient, theirs.gradient)
    return Row(name, judge.loss, judge.norm, effect, *pairs[:6], angle, *pairs[6:])


HEADINGS = {
    "variant": "variant", "loss": "loss", "grad_norm": "gradient norm", "effect": "effect",
    "loss_error": "loss error", "loss_error_torch": "torch's",
    "norm_error": "norm error", "norm_error_torch": "torch's",
    "gradient_error": "gradient error", "gradient_error_torch": "torch's",
    "one_minus_cosine": "1 - cosine",
    "movement_error": "movement error", "movement_error_torch": "torch's",
}  # fmt: skip


def cells(row: Row) -> list[str]:
    formats = {"loss": "{:+.5f}", "grad_norm": "{:.4f}", "effect": "{:.2g}"}
    values = asdict(row)
    return [values.pop("variant")] + [
        formats.get(name, "{:.1e}").format(value) for name, value in values.items()
    ]


def markdown(rows: list[Row]) -> str:
    lines = [list(HEADINGS.values()), ["---"] * len(HEADINGS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: list[Row]) -> None:
    table = Table(title="distance from float64 torch: jgrpo's, and float32 torch's")
    for i, heading in enumerate(HEADINGS.values()):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*cells(row))
    Console(stderr=True, width=None if sys.stderr.isatty() else 200).print(table)


def compare(args: Args) -> list[Row]:
    """A row for each variant that is asked for; tables and the JSON document on the way."""
    names = [name for name in VARIANTS if args.only in name]
    if not names:
        raise InputError(f"--only {args.only}: none of {', '.join(VARIANTS)}")
    rows = []
    with setting(args.run) as given:
        ours, theirs = Ours(given), Theirs(given, torch.float32)
        judge = Theirs(given, torch.float64)
        spread = np.abs(judge.ratios() - 1)
        plain = measured(judge, variant_config(given.config, {}), 0)
        for name in names:
            config = variant_config(given.config, VARIANTS[name])
            results = (measured(side, config, args.updates) for side in (ours, theirs, judge))
            rows.append(compared(name, *results, plain))
            print(name, file=sys.stderr)
    show(rows)
    if args.out:
        args.out.write_text(markdown(rows))
    else:
        print(markdown(rows))
    quantiles = {f"{q}": float(np.quantile(spread, q)) for q in (0.1, 0.5, 0.9, 0.99)}
    document = {
        "tokens": len(spread), "ratio_minus_1_quantiles": quantiles,
        "rows": [asdict(row) for row in rows], "problems": problems_of(rows),
    }  # fmt: skip
    print(json.dumps(document))
    return rows


def problems_of(rows: list[Row]) -> list[str]:
    return [problem for row in rows for problem in row.problems()]


def main() -> None:
    args = tyro.cli(Args)
    configure_jax()
    torch.set_num_threads(1)  # on products this small threads wait for each other most of the time
    with exit_status():
        if problems := problems_of(compare(args)):
            raise RunError("\n".join(problems))


if __name__ == "__main__":
    main()
