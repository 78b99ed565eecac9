"""The flags of a command, from its class and from config.py: a group for each section there.

What stands in config.py is the only text: names, defaults, and the docstring below each field.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from jgrpo.config import Config
from jgrpo.errors import InputError

STUDY_FLAGS = {"no_std_norm": "no_use_std_norm", "n_samples": "eval_n_samples"}
"""Flags of the PyTorch study that are named otherwise here, and a short name."""
ELSEWHERE = {
    "learning_rate": "lr", "num_generations": "group_size", "r": "lora_r", "rank": "lora_r",
    "alpha": "lora_alpha", "target_modules": "lora_target_modules", "epsilon": "clip_eps",
    "epsilon_high": "clip_eps_high", "max_completion_length": "max_tokens",
    "max_new_tokens": "max_tokens", "max_prompt_length": "max_prompt_tokens",
    "per_device_train_batch_size": "micro_batch_size", "train_batch_size": "micro_batch_size",
    "generation_batch_size": "n_prompts_per_step", "num_iterations": "epochs_per_step",
    "steps_per_generation": "updates_per_epoch", "max_steps": "n_grpo_steps",
    "num_train_epochs": "n_grpo_steps", "scale_rewards": "use_std_norm", "model": "model_id",
    "model_name_or_path": "model_id", "pretrained_model_name_or_path": "model_id",
    "dataset_name": "dataset_path", "dataset": "dataset_path", "output_dir": "run_dir",
    "save_steps": "checkpoint_every", "eval_steps": "eval_every", "logging_dir": "base_dir",
    "warmup_ratio": "warmup_steps", "reward_funcs": "reward_function", "bf16": "dtype",
    "torch_dtype": "dtype", "vllm_server_base_url": "vllm_url", "kl_coef": "beta",
    "kl_beta": "beta", "delta": "clip_delta", "use_bias_correction_kl": "use_weighted_kl",
    "vllm_importance_sampling_mode": "importance_weight_mode",
    "sapo_temperature_pos": "sapo_tau_positive", "sapo_temperature_neg": "sapo_tau_negative",
    "vllm_importance_sampling_correction": "use_importance_weights",
    "use_vllm": "rollout", "attn_impl": "attn_implementation", "reward_model": "prm_model_id",
}  # fmt: skip
"""What TRL and PEFT call it, and what it is called here."""
DERIVED = {
    "gradient_accumulation_steps": "it follows from n_prompts_per_step, group_size and "
    "micro_batch_size: every completion of a step is counted once",
    "max_grad_norm": "the gradient's norm is clipped at 1, as in the study",
    "lora_dropout": "there is no dropout: the policy that is trained is the one that is sampled",
}


def parse_flags(kind: type, config: Config, args: Sequence[str], prog: str) -> Any:
    """A command's dataclass, whose `options` is a Config, from the words after its name; `config`
    gives the defaults, and what a flag of the command's own hides. Ends the process where the words
    cannot be read; InputError where the values cannot be used."""
    words = plain([*args])
    own = [f for f in dataclasses.fields(kind) if f.name not in ("options", "members")]
    hidden = {f.name: getattr(config, f.name) for f in own if hasattr(config, f.name)}
    names_of = {title: [n for n in names if n not in hidden] for title, names in sections().items()}
    groups = {title: _group(title, names, config) for title, names in names_of.items()}
    fields: list[Any] = [(f.name, _flag(f, docs_of(kind)), _default(f)) for f in own]
    for title, group in groups.items():
        there: Any = Annotated[group, tyro.conf.arg(name=title), tyro.conf.OmitArgPrefixes]  # type: ignore[valid-type]
        fields.append((_name(title), there, dataclasses.field(default_factory=group)))
    flat = dataclasses.make_dataclass(kind.__name__, fields)
    flat.__doc__ = kind.__doc__
    read: Any = tyro.cli(flat, args=words, prog=prog, use_underscores=True)
    values: dict[str, Any] = hidden
    for title in groups:
        values |= vars(getattr(read, _name(title)))
    return kind(options=Config(**values), **{f.name: getattr(read, f.name) for f in own})


def plain(args: list[str]) -> list[str]:
    """One spelling of each flag: `--use_clip`, `--use_clip=true` and `--no_use_clip` as a flag and
    True or False. InputError, with the name that is meant, for a flag of TRL's or PEFT's."""
    names = {f.name for f in dataclasses.fields(Config)}
    switches = {f.name for f in dataclasses.fields(Config) if f.type in (bool, bool | None)}
    words: list[str] = []
    rest = args.copy()
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        name = STUDY_FLAGS.get(name, name)
        positive = name.removeprefix("no_")
        if not word.startswith("--"):
            words.append(word)
        elif name in DERIVED:
            raise InputError(f"--{name} is no option here: {DERIVED[name]}")
        elif name in ELSEWHERE and name not in names:
            raise InputError(f"--{name} is called --{ELSEWHERE[name]} here")
        elif positive in switches:
            if not equals and rest and rest[0].lower() in ("true", "false"):
                value = rest.pop(0)
            if value.lower() not in ("", "true", "false"):
                raise InputError(f"--{name}={value}: must be True or False")
            words += [f"--{positive}", str((value.lower() != "false") == (name == positive))]
        else:
            words.append(f"--{name}{equals}{value}")
    return words


@functools.cache
def sections() -> dict[str, list[str]]:
    """The sections of config.py, by title, and the names of the fields in each."""
    found: dict[str, list[str]] = {}
    title = "options"
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # -- (.+)", line):
            title = heading[1]
        elif field := re.match(r"    (\w+): ", line):
            found.setdefault(title, []).append(field[1])
    return found


@functools.cache
def docs_of(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and its bases; lines of a paragraph joined."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                docs[ast.unparse(node.target)] = " ".join(ast.literal_eval(after.value).split())
    return docs


def _name(title: str) -> str:
    return "group_" + re.sub(r"\W", "_", title)


def _group(title: str, names: Sequence[str], config: Config) -> type:
    docs = docs_of(Config)
    fields = [
        (f.name, _flag(f, docs), dataclasses.field(default=getattr(config, f.name)))
        for f in dataclasses.fields(Config)
        if f.name in names
    ]
    group = dataclasses.make_dataclass(_name(title), fields)
    group.__doc__ = ""
    return group


def _flag(field: dataclasses.Field, docs: dict[str, str]) -> Any:
    """A field's type with what --help shows of it."""
    kind: Any = field.type
    if get_origin(kind) is Annotated:
        return kind
    shown = tyro.conf.arg(help=docs.get(field.name), metavar=_metavar(kind))
    if kind is bool and isinstance(field.default, bool) and field.name in docs_of(Config):
        return Annotated[kind, shown, tyro.conf.FlagConversionOff]
    if kind is bool:
        return Annotated[kind, shown, tyro.conf.FlagCreatePairsOff]
    return Annotated[kind, shown]


def _metavar(kind: Any) -> str | None:
    """One word for a value: NUMBER, N (an integer), PATH, TEXT; None: the choices."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_metavar(k) or "" for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    if kind is bool or get_origin(kind) is Literal:
        return None
    return {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(kind, "VALUE")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=field.default)
