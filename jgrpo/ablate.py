"""Ablate: python -m jgrpo.ablate rollouts RUN ..., or python -m jgrpo.ablate runs --config FILE ...

`rollouts` computes the loss and gradient of every variant on one step's saved rollouts (seconds);
`runs` trains every variant over several seeds and writes a report.
"""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from jgrpo import cli
from jgrpo.config import Config
from jgrpo.errors import InputError, exit_status
from jgrpo.run.rundir import as_begun, jsonable, rollouts_file, write_whole
from jgrpo.study.variants import BASELINE, Variant, read_variants, with_references

USAGE = """usage: python -m jgrpo.ablate {rollouts,runs} [-h] [OPTIONS]

  rollouts RUN   every variant's loss and gradient on a run's saved rollouts: seconds
  runs           variants x seeds as runs, with a report; --config FILE gives the base

A variant is the name of a file in configs/, a FIELD=VALUE, or several joined by +:

  python -m jgrpo.ablate rollouts runs/1 --step 10 --variants clip dapo entropy_coef=0.01
  python -m jgrpo.ablate runs --config configs/tiny.py --variants rank4 lr=2e-3 --seeds 0 1 2

Each has its own --help."""
TECHNIQUES = ("no_std_norm", "kl", "clip", "token_level", "dr_grpo", "gspo", "cispo", "rloo",
              "dapo")  # fmt: skip
REWARDS = ("length_penalty", "prm")
STUDY = (BASELINE, "rank4", "rank16", *TECHNIQUES, *REWARDS)
ON_ROLLOUTS = (BASELINE, *TECHNIQUES, *REWARDS, "kl_base")
NOT_OF_A_LOSS = {"use_dynamic_sampling", "max_sampling_rounds"}
"""What a variant changes beside its loss, advantage and reward, and what can be left away here."""
OF_A_LOSS = {
    *("loss_type", "use_std_norm", "use_leave_one_out", "use_kl_penalty", "beta", "kl_to"),
    *("kl_estimator", "use_clip", "clip_eps", "clip_eps_high", "cispo_max_ratio", "entropy_coef"),
    *("use_token_level_loss", "use_importance_weights", "importance_weight_cap"),
    *("mask_truncated_completions", "use_length_penalty", "expected_maximum_length"),
    *("clip_delta", "use_weighted_kl", "importance_weight_mode", "dppo_max_difference"),
    *("sapo_tau_positive", "sapo_tau_negative"),
    *("overlong_cache", "use_prm", "process_reward_weight", "prm_model_id", "prm_batch_size"),
}


@dataclass(frozen=True)
class Rollouts:
    """Every variant's loss and adapter gradient on one step's saved rollouts."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    step: int = 1
    """Whose rollouts; they were sampled with adapter step - 1."""
    policy_step: int | None = None
    """Adapter that is differentiated. Default: the one that sampled, where every ratio is 1; a
    later one shows what clip and KL do."""
    variants: tuple[str, ...] = ON_ROLLOUTS
    """Names of config files (what they change of rank1.py), FIELD=VALUE, or several joined by +."""
    configs: Path = Path("configs")
    """Where the config files are."""
    out: Path | None = None
    """Folder of the table and the heat map. Default: RUN/ablation/step_K_policy_J."""


# -- on fixed rollouts ------------------------------------------------------------------------


def on_rollouts(options: Rollouts, console: Console) -> Path:
    """Compare the variants on a step's rollouts, print the table -> the folder of the report."""
    from jgrpo.run.policy import open_policy
    from jgrpo.run.scoring import open_scorers
    from jgrpo.run.session import configure_jax
    from jgrpo.study import compare as fixed  # only now: help and mistakes do not wait for JAX
    from jgrpo.study.pictures import draw_cosines
    from jgrpo.study.report import table, write_report

    configure_jax()
    sampled_by = options.step - 1
    differentiated = sampled_by if options.policy_step is None else options.policy_step
    config = cli.resumed_config(options.run)
    names = options.variants
    names = names if BASELINE in names else (BASELINE, *names)  # the cosines are with the first
    variants = read_variants(names, options.configs)
    configs = {v.name: variant_on_rollouts(v, config) for v in variants}
    file = rollouts_file(options.run, options.step)
    lines = fixed.read_rollouts(file, config.group_size)
    rows = [fixed.rows_for(c, lines, open_scorers(c)) for c in configs.values()]
    opened = open_policy(as_begun(config, options.run))
    policy, old = fixed.load_adapters(options.run, opened, sampled_by, differentiated)
    found = fixed.compare(configs, rows, policy, old, opened.adapter)
    header = ["variant", "loss", "|gradient|", f"cosine to {found.names[0]}", "clipped tokens, %",
              "KL to old, nats"]  # fmt: skip
    body = [
        [f"`{name}`", f"{found.loss[i]:+.6f}", f"{found.grad_norm[i]:.6f}",
         f"{found.cosine[0, i]:.6f}", f"{100 * found.metrics[i]['clip_fraction']:.2f}",
         f"{found.metrics[i]['approx_kl']:.2e}"]
        for i, name in enumerate(found.names)
    ]  # fmt: skip
    out = options.out or (
        options.run / "ablation" / f"step_{options.step:06d}_policy_{differentiated:06d}"
    )
    out.mkdir(parents=True, exist_ok=True)
    on_policy = " (on policy: every ratio is 1)" * (sampled_by == differentiated)
    text = f"""Rollouts of step {options.step} ({len(lines)} completions, sampled with adapter
{sampled_by}), gradient at adapter {differentiated}{on_policy}.
The gradient norm is before clipping at 1; the loss of CISPO is not comparable.

    {shlex.join(["python", "-m", "jgrpo.ablate", *sys.argv[1:]])}

{table(header, body)}
![cosines](cosines.png)
"""
    pictures = {"cosines.png": draw_cosines(found.names, found.cosine)}
    write_report(out, "Loss variants on the same rollouts", text, pictures)
    write_whole(out / "comparison.json", json.dumps(jsonable(vars(found))) + "\n")
    show(console, header, body)
    console.print(f"report: {out / 'report.md'}", markup=False)
    return out


def variant_on_rollouts(variant: Variant, config: Config) -> Config:
    """The run's config with a variant's loss, advantage and reward. InputError if it changes what
    has been decided when the rollouts were sampled."""
    plain = Config()
    reset = {name: getattr(plain, name) for name in ("loss_type", "use_std_norm")}
    reset |= {f.name: False for f in fields(Config) if f.name in OF_A_LOSS and f.type is bool}
    changes = {k: v for k, v in variant.changes.items() if k not in NOT_OF_A_LOSS}
    if odd := sorted(changes.keys() - OF_A_LOSS):
        raise InputError(
            f"variant {variant.name} changes {', '.join(odd)}: on saved rollouts only the loss, "
            "the advantages and the rewards can change; try `python -m jgrpo.ablate runs`"
        )
    return replace(variant, changes=reset | {"use_std_norm": True} | changes).apply(config)


# -- as runs ----------------------------------------------------------------------------------


def as_runs(command: cli.AblateRuns, console: Console) -> Path:
    """Train what is not done yet, then report -> the folder of the report."""
    from jgrpo.study import pictures, report, sweep
    from jgrpo.train import train_together

    if command.config is None:
        raise InputError("--config FILE is needed: variants are the files beside it")
    given = [n for n in (command.jobs, command.together) if n is not None]
    if min(given, default=1) < 1 or not command.seeds:
        raise InputError("--jobs must be 1 or more, as --together, and there must be a seed")
    names = with_references(asked := command.variants or STUDY)
    variants = read_variants(names, command.config.parent)
    if added := names[: len(names) - len(asked)]:
        console.print(f"to compare with, also: {', '.join(added)}", markup=False)
    jobs = sweep.plan(command.options, variants, command.seeds, command.out)
    words = shlex.join(["python", "-m", "jgrpo.ablate", *sys.argv[1:]])
    sweep.write_manifest(command.out, command.options, variants, words)
    start_s = time.monotonic()
    sweep.run_all(jobs, train_together, command.jobs, console, command.together)
    console.print(f"{(time.monotonic() - start_s) / 60:.1f} minutes")
    results: report.Results = {
        v.name: {j.seed: report.read_run(j.folder) for j in jobs if j.variant == v.name}
        for v in variants
    }
    about = {v.name: v.about for v in variants}
    references = {v.name: v.reference for v in variants}
    found = report.results_table(results, references, command.margin)
    text = f"""{report.explain(command.margin, len(command.seeds))}

    {words}

{report.table(*found)}
What each variant is:

{report.listing(about)}
![differences](effects.png)

![curves](curves.png)
"""
    drawn = {
        "effects.png": pictures.draw_effects(results, references, command.margin),
        "curves.png": pictures.draw_curves(results, references),
    }
    report.write_report(command.out, f"Ablation of {command.config.stem}", text, drawn)
    header, body = found
    show(console, [header[0], header[2], header[5], header[-1]],
         [[row[0], row[2], row[5], row[-1]] for row in body])  # fmt: skip
    console.print(f"report: {command.out / 'report.md'}", markup=False)
    return command.out


def show(console: Console, header: Sequence[str], body: Sequence[Sequence[object]]) -> None:
    """A table whose names are whole, and numbers where there is room; what is too wide for the
    terminal goes on below."""
    lines = [[str(cell).strip("`") for cell in line] for line in (header, *body)]
    columns = [*zip(*lines, strict=True)]
    words = [max(len(word) for cell in column for word in cell.split()) for column in columns]
    there_is_room = sum(words) + 3 * len(words) <= console.width
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, (title, width) in enumerate(zip(header, words, strict=True)):
        least = width if there_is_room else None
        shown.add_column(title, no_wrap=i == 0, overflow="fold", min_width=least)
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)


def parse(args: Sequence[str]) -> Rollouts | cli.AblateRuns:
    """The command line. InputError for what cannot be used."""
    kind, rest = (args[0] if args else ""), list(args[1:])
    if kind == "rollouts":
        prog = "python -m jgrpo.ablate rollouts"
        return tyro.cli(Rollouts, args=rest, prog=prog, use_underscores=True)
    if kind == "runs":
        return cli.parse(cli.AblateRuns, rest, name="ablate runs")
    if kind in ("-h", "--help"):
        print(USAGE)
        sys.exit(0)
    wrong = f"{kind!r} is neither rollouts nor runs" if args else "say what: rollouts or runs"
    raise InputError(f"{wrong}\n{USAGE}")


def main() -> None:
    cli.tune_allocator()
    console = Console(highlight=False)
    with exit_status():
        asked = parse(sys.argv[1:])
        if isinstance(asked, Rollouts):
            on_rollouts(asked, console)
        else:
            as_runs(asked, console)


if __name__ == "__main__":
    main()
