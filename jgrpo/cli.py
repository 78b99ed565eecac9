"""The command line: `--config FILE`, and a flag for every field of Config.

The file gives the defaults, flags override it, `--help` shows what would run. Nothing heavy is
imported here, so that help and mistakes are answered at once.
"""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from jgrpo.checks import ASKED_BY_EVALUATION, unread_by_evaluation
from jgrpo.config import Config, config_of_run, load_config
from jgrpo.errors import SIGNALS, InputError
from jgrpo.flags import parse_flags, plain
from jgrpo.members import differing
from jgrpo.run.rundir import adapter_of, last_adapter, read_config, run_of_adapter

KEEP_FREED_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=17179869184:"
    "glibc.malloc.trim_threshold=17179869184"
)
CHANGEABLE_ON_RESUME = {
    "n_grpo_steps", "vllm_url", "vllm_timeout_s", "vllm_move_s", "micro_batch_size",
    "gradient_checkpointing", "fsdp",
    "eval_every", "checkpoint_every", "save_total_limit", "checkpoint_keep_period",
    "grader_timeout_s", "grader_workers", "max_logprob_diff", "max_mean_logprob_diff",
    "check_stale",
    "report_to", "project", "show_every",
}  # fmt: skip
"""Options that a resumed run may change: none of them changes what a step computes, but for the
order of sums (micro-batches, recomputation, devices)."""


@dataclass(frozen=True)
class Command:
    """What every command is asked for."""

    config: Path | None = None
    """A config that comes with jgrpo, by name (tiny); a file of Python that defines `config`; or a
    run's config.json. Its values become the defaults below."""
    options: Config = field(default_factory=Config)


@dataclass(frozen=True)
class Train(Command):
    """Train a LoRA adapter by GRPO against a verifiable reward."""

    config: tuple[Path, ...] = ()  # type: ignore[assignment]
    """A config that comes with jgrpo, by name (tiny); a file of Python that defines `config`; or a
    run's config.json. Its values become the defaults below. Several are trained side by side over
    one base, each into a run folder of its own; flags are for all of them."""
    seeds: tuple[int, ...] = ()
    """Train each config with these seeds, side by side."""
    resume: tuple[Path, ...] = ()
    """Run folder to go on with, from its last checkpoint and with its own config; the folders of
    runs that were side by side go on so, each from the last step that all have."""
    dry_run: bool = False
    """Read everything but the weights, say how much memory training will take, and stop."""
    coordinator_address: str = ""
    """host:port of the first of several processes, where neither Slurm, Open MPI, Kubernetes nor a
    TPU pod says who is there; with num_processes and process_id (docs/scale.md)."""
    num_processes: int = 0
    """How many processes there are."""
    process_id: int = -1
    """Which of them this is, from 0."""
    members: tuple[Config, ...] = ()
    """The configs of all that are trained."""


@dataclass(frozen=True)
class Evaluate(Command):
    """Accuracy on the evaluation problems, or on named sets, of the base model or of adapters:
    greedy, or avg@n, pass@k and maj@k of --n_samples completions a problem (--eval_n_samples), each
    with its 95 % interval over problems. Prints a table, and one JSON line on stdout."""

    run: tuple[Path, ...] = ()
    """Run folder: its own config, and the adapter of its last step. Of several, whose evaluation
    must be the same, the adapters are sampled side by side."""
    step: int | None = None
    """The adapter of this step of --run instead."""
    adapter: Path | None = None
    """PEFT folder of an adapter, or a run folder for its last one; an adapter within a run brings
    the run's config where no --config is given. Without any of these: the base model."""
    all_steps: bool = False
    """Every adapter that --run has kept, first to last; draws eval_curve.png in its folder, or
    beside --out."""
    against: Path | None = None
    """`base`, or another adapter (a PEFT folder, a run): asked the same problems, for the paired
    difference, McNemar's exact p and the problems that changed."""
    eval_set: tuple[str, ...] = ()
    """Named sets, in place of the config's evaluation problems and whole: gsm8k, math500, aime24,
    aime25, amc23, minerva, olympiadbench."""
    eval_set_folder: Path | None = None
    """Folder of local copies of the named sets (gsm8k.jsonl, ...), for where there is no hub."""
    out: Path | None = None
    """File for the completions, a JSON line each. Default: eval.jsonl in each run's folder, where
    it replaces the last evaluation's; without a run, none is written."""


@dataclass(frozen=True)
class Filter(Command):
    """Pass rates of the training problems: --k completions of each by the base (or by --adapter),
    sampled as rollouts are, counted into --pass_rate_file, of which `train --pass_rate` takes a
    part."""

    k: int = 8
    """Completions of each training problem."""


@dataclass(frozen=True)
class Serve(Command):
    """Start vLLM with exactly the options that a config needs; what follows `--` goes to vLLM."""

    print: bool = False
    """Show the command and stop."""
    max_loras: int = 1
    """Adapters that are sampled at once: as many as `train` has runs side by side. --lora_r is the
    largest rank among them."""
    head_dtype: Literal["", "float32"] = ""
    """float32: the logits leave the last product unrounded, as the trainer's do, which brings the
    two nearer in 16 bits, for the time that a float32 product takes. Empty: as the base."""
    devices: str = ""
    """Start a server on each of these (0,1,2,3): ports upwards from the first vllm_url's, all ended
    together, one that dies started again; the --vllm_url for the trainer is printed."""


@dataclass(frozen=True)
class AblateRuns(Command):
    """Train variants of a config over several seeds, and report what they gain. The same command
    goes on after a stop. A variant is the name of a config file beside --config (what it changes of
    rank1.py), a FIELD=VALUE, or several joined by +."""

    variants: tuple[str, ...] = ()
    """Default: the study's whole table."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run of each variant for each."""
    out: Path = Path("ablations/study")
    """Folder of the runs and the report."""
    jobs: int | None = None
    """Processes at a time; the cores are shared among them. Default: with a GPU or a server 1, else
    one a core as far as the memory goes, 8 at most."""
    together: int | None = None
    """Runs that one process trains side by side over one base, where they share what they must
    (all but the loss, the rewards, rank, learning rate and seed). Sums are then in another order
    than alone, so that rows differ by rounding; 1: each alone. Default: as many as fit into the
    memory by --dry_run's figure, 16 at most; it is told."""
    margin: float = 0.02
    """Gain in accuracy (a fraction) below which a row counts as no gain."""


C = TypeVar("C", bound=Command)


def parse(kind: type[C], argv: Sequence[str] | None = None, *, name: str = "") -> C:
    """Read the command line of one of the commands above. InputError for what cannot be used.

    `name` is the command's, if it is not that of the class.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    several = "*" if kind is Train else None
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path, nargs=several)
    first.add_argument("--resume", type=Path, nargs=several)
    first.add_argument("--run", type=Path, nargs="*")
    first.add_argument("--adapter", type=Path)
    try:
        given, _ = first.parse_known_args(args)
    except argparse.ArgumentError:
        nothing = dict.fromkeys(("config", "resume", "run", "adapter"))
        given = argparse.Namespace(**nothing)  # tyro says what is wrong
    for name in ("config", "resume"):
        if getattr(given, name) == []:
            raise InputError(f"--{name}: Missing value; give a file, a name or a run folder")
    configs = [Config()]
    if given.resume and kind is Train:
        if given.config:
            raise InputError("--resume goes on with the run's own config; leave --config away")
        configs = [resumed_config(run) for run in given.resume]
    elif given.config:
        configs = [load_config(file) for file in (given.config if several else [given.config])]
    elif kind is Evaluate and given.run:
        configs = [resumed_config(run) for run in given.run]
    elif kind is Evaluate and (run := run_of_adapter(given.adapter)):
        configs = [resumed_config(run)]
    config = configs[0]
    prog = f"python -m jgrpo.{name or kind.__name__.lower()}"
    command: C = parse_flags(kind, config, args, prog)
    words = {word.partition("=")[0].removeprefix("--") for word in plain(args)}
    if isinstance(command, Train):
        members = _members(command, configs, words)
        command = dataclasses.replace(command, options=members[0], members=members)
    elif not isinstance(command, Evaluate) and command.options.adapter:
        from jgrpo.run.policy import begun  # only now: help and mistakes do not wait for JAX

        command = dataclasses.replace(command, options=begun(command.options, words))
    if isinstance(command, Evaluate):
        _check_evaluated_alike(command, configs, words)
        against = command.against if str(command.against) == "base" else _last_of(command.against)
        command = dataclasses.replace(command, adapter=_adapter_of(command), against=against)
        names = [f.name for f in dataclasses.fields(Config)]
        changed = [n for n in names if getattr(command.options, n) != getattr(config, n)]
        for line in unread_by_evaluation(changed):
            print(f"note: {line}", file=sys.stderr)
    return command


def _members(command: Train, configs: Sequence[Config], words: set[str]) -> tuple[Config, ...]:
    """All that is to be trained: each config with the flags that were given, and each seed."""
    if command.resume and command.seeds:
        raise InputError("--resume goes on with the run's own seed; leave --seeds away")
    names = [f.name for f in dataclasses.fields(Config) if f.name in words]
    flags = {name: getattr(command.options, name) for name in names}
    members = [command.options, *(dataclasses.replace(c, **flags) for c in configs[1:])]
    for saved, asked in zip(configs, members, strict=True) if command.resume else ():
        _check_resume(saved, asked)
    if any(config.adapter for config in members) and not command.resume:
        from jgrpo.run.policy import begun  # only now: help and mistakes do not wait for JAX

        members = [begun(config, words) for config in members]
    seeds = command.seeds or (None,)
    return tuple(
        config if seed is None else dataclasses.replace(config, seed=seed)
        for config in members
        for seed in seeds
    )


def _adapter_of(command: Evaluate) -> Path | None:
    """The PEFT folder that --run and --step, or --adapter, name. InputError where they conflict."""
    run, step, adapter = next(iter(command.run), None), command.step, command.adapter
    if run is None and (step is not None or command.all_steps):
        given = "--all_steps" if step is None else f"--step {step}"
        raise InputError(f"{given}: of which run? Give --run RUN with it")
    if step is not None and command.all_steps:
        raise InputError(f"--step {step} and --all_steps: take one of the two")
    if run is not None and (adapter or command.config):
        other = "--adapter" if adapter else "--config"
        raise InputError(f"--run {run} brings its own config and adapters; leave {other} away")
    if run is not None:
        return adapter_of(run, step)
    return _last_of(adapter)


def _check_evaluated_alike(command: Evaluate, configs: Sequence[Config], given: set[str]) -> None:
    """InputError if runs would be asked other problems, or otherwise, by their own configs."""
    if len(set(command.run)) < len(command.run):
        raise InputError("--run: a run is given twice")
    if odd := [n for n in differing(configs) if n in ASKED_BY_EVALUATION and n not in given]:
        values = "; ".join(
            f"{name}: {', '.join(dict.fromkeys(repr(getattr(c, name)) for c in configs))}"
            for name in odd
        )
        raise InputError(
            f"these runs evaluate otherwise, by their own configs ({values}): evaluate them apart, "
            f"or give one value for all, as --{odd[0]}"
        )


def _last_of(adapter: Path | None) -> Path | None:
    """The last adapter, if this is a run folder; any other folder as it is."""
    return last_adapter(adapter) if adapter and run_of_adapter(adapter) == adapter else adapter


def tune_allocator() -> None:
    """On Linux without a GPU, start this process again with glibc told to keep freed memory.

    XLA's CPU client takes fresh memory for every execution; mapping it costs up to half of the
    training time (docs/log.md), and the variable is read only when a process starts.
    """
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    if sys.platform == "linux" and not has_gpu and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until stop_at_once: Python's own start
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def resumed_config(run: Path) -> Config:
    """The config that a run was started with. InputError if it is not one of this version's."""
    read_config(run)
    return config_of_run(run / "config.json")


def _check_resume(saved: Config, asked: Config) -> None:
    changeable = set(CHANGEABLE_ON_RESUME)
    if saved.lr_scheduler_type != "constant":
        changeable.remove("n_grpo_steps")  # the learning rate falls to 0 at the last of them
    changed = [
        f"{f.name}: {getattr(saved, f.name)!r} -> {getattr(asked, f.name)!r}"
        for f in dataclasses.fields(Config)
        if getattr(saved, f.name) != getattr(asked, f.name) and f.name not in changeable
    ]
    if changed:
        raise InputError(
            "a resumed run cannot change what it computes:\n  "
            + "\n  ".join(changed)
            + f"\nIt may change: {', '.join(sorted(changeable))}"
        )
