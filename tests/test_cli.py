"""jgrpo.cli: what flags do to a config, and how each command says that it cannot go on."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jgrpo import cli
from jgrpo.cli import Evaluate, Serve, Train, parse
from jgrpo.config import PROJECTIONS, Config
from jgrpo.errors import InputError
from jgrpo.run.rundir import write_config

ROOT = Path(__file__).parent.parent
FIELDS = [field.name for field in dataclasses.fields(Config)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from jgrpo.config import Config\nconfig = Config(lr=1e-3, seed=7, use_clip=True)\n"
    )
    return path


def options(*args: str) -> Config:
    return parse(Train, args).options


def changed(config: Config, base: Config | None = None) -> dict:
    """The fields in which a config differs from the defaults, or from another."""
    base = base or Config()
    names = (name for name in FIELDS if getattr(config, name) != getattr(base, name))
    return {name: getattr(config, name) for name in names}


# -- flags ------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_defaults(file):
    assert options() == Config()
    from_file = {"lr": 1e-3, "seed": 7, "use_clip": True}
    assert changed(options("--config", str(file))) == from_file
    assert changed(options(f"--config={file}")) == from_file
    for args in (["--config", str(file), "--lr", "2e-3"], ["--lr", "2e-3", "--config", str(file)]):
        assert changed(options(*args)) == from_file | {"lr": 2e-3}
    assert changed(options("--config", str(file), "--no_use_clip")) == {"lr": 1e-3, "seed": 7}


@pytest.mark.parametrize(
    ("args", "meaning"),
    [
        ("--lora_r 4", {"lora_r": 4}),
        ("--no_std_norm", {"use_std_norm": False}),
        ("--use_kl_penalty --beta 0.1", {"use_kl_penalty": True, "beta": 0.1}),
        ("--use_kl_penalty --beta 0.04", {"use_kl_penalty": True}),
        ("--use_clip --clip_eps 0.3", {"use_clip": True, "clip_eps": 0.3}),
        ("--use_clip --clip_eps 0.2", {"use_clip": True}),
        ("--use_token_level_loss", {"use_token_level_loss": True}),
        ("--use_clip True --use_std_norm False", {"use_clip": True, "use_std_norm": False}),
        ("--use_length_penalty", {"use_length_penalty": True}),
        ("--use_prm --process_reward_weight 0.5", {"use_prm": True}),
        ("--lora_target_modules q_proj v_proj", {"lora_target_modules": ("q_proj", "v_proj")}),
        ("--rollout jax --dtype float32", {"rollout": "jax", "dtype": "float32"}),
        ("--vllm_url http://a:1,http://b:2", {"vllm_url": "http://a:1,http://b:2"}),
        ("--n-grpo-steps 3", {"n_grpo_steps": 3}),
    ],
)
def test_the_study_s_flags_mean_what_they_meant(args, meaning):
    assert changed(options(*args.split())) == meaning


def another(field: dataclasses.Field) -> tuple[list[str], object]:
    """A value that is not the default, as flag and as itself."""
    name, default = field.name, field.default
    if isinstance(default, bool) or name == "use_importance_weights":
        return [f"--no_{name}" if default else f"--{name}"], not default
    if name == "reward_function":
        return ["--reward_function", "a.py:f", "b.py:g"], ("a.py:f", "b.py:g")
    if name == "reward_weights":
        return ["--reward_weights", "1", "0.5"], (1.0, 0.5)
    if name == "pass_rate":
        return ["--pass_rate", "0.2", "0.8"], (0.2, 0.8)
    if name == "report_to":
        return ["--report_to", "wandb", "tensorboard"], ("wandb", "tensorboard")
    if isinstance(default, tuple):
        return [f"--{name}", PROJECTIONS[0]], (PROJECTIONS[0],)
    if name == "eval_n_samples":
        return ["--eval_n_samples", "4", "--eval_temperature", "0.6"], 4
    if name == "eval_top_p":
        return ["--eval_top_p", "0.9", "--eval_temperature", "0.6"], 0.9
    values = {
        "dtype": "float32", "rollout": "jax", "vllm_url": "http://x:1", "clip_eps": 0.5,
        "clip_eps_high": 0.3, "process_reward_weight": 0.25,
        "clip_delta": 3.0, "eval_temperature": 0.6, "importance_weight_mode": "sequence_mask",
        "loss_type": "gspo", "kl_to": "base", "kl_estimator": "k2", "lr_scheduler_type": "cosine",
        "attn_implementation": "cudnn", "max_mean_logprob_diff": 0.1,
    }  # fmt: skip
    value = values.get(name, default + 1 if isinstance(default, int | float) else f"other-{name}")
    return [f"--{name}", str(value)], value


ALONE = ("updates_per_epoch", "attn_implementation", "rollouts_ahead")
"""At odds with another field's `another`."""
TOGETHER = [f for f in dataclasses.fields(Config) if f.name not in (*ALONE, "adapter")]
"""All but `adapter`, which reads a folder: tests/test_begin.py."""
COMMAND_LINES = [TOGETHER, *([f] for f in dataclasses.fields(Config) if f.name in ALONE)]


@pytest.mark.parametrize("fields", COMMAND_LINES, ids=lambda fields: fields[-1].name)
def test_every_field_is_a_flag(fields):
    given = {f.name: another(f) for f in fields}
    found = changed(options(*(word for args, _ in given.values() for word in args)))
    assert {name: found.get(name) for name in given} == {
        n: value for n, (_, value) in given.items()
    }


def test_the_commands_own_flags(tmp_path):
    asked = parse(Evaluate, ["--adapter", "runs/1/adapters/step_000050", "--out", "o.jsonl"])
    assert asked.adapter == Path("runs/1/adapters/step_000050")
    assert asked.out == Path("o.jsonl")
    assert parse(Evaluate, []).adapter is None
    assert parse(Serve, ["--print"]).print
    assert not parse(Serve, []).print


# -- resume -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was started with a config of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, Config(lr=5e-4, lora_target_modules=("q_proj",), lora_alpha=8), {})
    return folder


def test_resume_takes_the_run_s_own_config(run):
    command = parse(Train, ["--resume", str(run)])
    assert command.resume == (run,)
    assert changed(command.options) == {
        "lr": 5e-4, "lora_target_modules": ("q_proj",), "lora_alpha": 8,
    }  # fmt: skip


def test_resume_refuses_to_change_what_is_computed(run):
    with pytest.raises(InputError) as error:
        parse(Train, ["--resume", str(run), "--lr", "1e-3", "--use_clip", "--n_grpo_steps", "99"])
    text = str(error.value)
    assert "lr: 0.0005 -> 0.001" in text
    assert "use_clip: False -> True" in text
    assert "n_grpo_steps: " not in text  # that one may change


OF_THE_RUN = ("lr", "lora_target_modules", "lora_alpha")  # those that `run` has of its own


def test_resume_may_change_what_does_not_matter_to_a_step(run):
    fields = [f for f in TOGETHER if f.name in cli.CHANGEABLE_ON_RESUME]
    assert {f.name for f in fields} == cli.CHANGEABLE_ON_RESUME
    args, values = zip(*(another(f) for f in fields), strict=True)
    new = parse(Train, ["--resume", str(run), *(word for words in args for word in words)]).options
    assert [getattr(new, f.name) for f in fields] == [*values]


@pytest.mark.parametrize("fields", COMMAND_LINES, ids=lambda fields: fields[-1].name)
def test_resume_may_change_nothing_else(run, fields):
    fixed = {*FIELDS} - cli.CHANGEABLE_ON_RESUME - {*OF_THE_RUN}
    given = {f.name: another(f)[0] for f in fields if f.name in fixed}
    with pytest.raises(InputError, match="cannot change what it computes") as error:
        parse(Train, ["--resume", str(run), *(word for args in given.values() for word in args)])
    named = re.findall(r"^  (\w+): .* -> ", str(error.value), re.MULTILINE)
    with_them = {"use_importance_weights"} if "rollouts_ahead" in given else set()  # on by itself
    assert {*named} == given.keys() | with_them


def test_resume_keeps_the_number_of_steps_that_a_schedule_was_made_for(tmp_path):
    write_config(tmp_path, Config(lr_scheduler_type="linear"), {})
    with pytest.raises(InputError, match=r"n_grpo_steps: 50 -> 60"):
        parse(Train, ["--resume", str(tmp_path), "--n_grpo_steps", "60"])


def test_resume_and_config_exclude_each_other(run, file):
    with pytest.raises(InputError, match="leave --config away"):
        parse(Train, ["--resume", str(run), "--config", str(file)])


def test_resume_of_what_is_no_run_or_of_another_version_is_told(run, tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "nothing"))):
        parse(Train, ["--resume", str(tmp_path / "nothing")])
    saved = (run / "config.json").read_text()
    (run / "config.json").write_text(saved.replace('"lora_r"', '"lora_rank"'))
    with pytest.raises(InputError, match=r"another version.*\['lora_r', 'lora_rank'\]"):
        parse(Train, ["--resume", str(run)])


# -- as a user meets it -----------------------------------------------------------------------


def command(module: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"jgrpo.{module}", *args],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "module",
    ["train", "evaluate", "serve", "plot", pytest.param("tiny", marks=pytest.mark.slow)],
)
def test_every_command_has_help(module):
    done = command(module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    if module in ("train", "evaluate", "serve"):
        assert "--config" in done.stdout
        missing = [
            f for f in FIELDS if f"--{f}" not in done.stdout and f"no_{f}" not in done.stdout
        ]
        assert not missing


def test_help_shows_what_the_file_says(file):
    done = command("train", "--config", str(file), "--help")
    assert done.returncode == 0
    assert "0.001" in done.stdout


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_help_does_not_wait_for_jax(module):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('jgrpo.{module}', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('heavy:', sorted({'jax', 'flax', 'torch', 'transformers'} & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("heavy: []"), done.stdout[-300:] + done.stderr


@pytest.mark.parametrize(
    ("module", "args", "says"),
    [
        ("train", "--lr abc", ["--lr", "abc"]),
        ("evaluate", "--config nix.py", ["error: --config nix.py: no such file"]),
        ("serve", "--config nix.py", ["error: --config nix.py: no such file"]),
        ("plot", "nix", ["nix: not a run folder"]),
    ],
)
def test_what_cannot_be_used_is_one_message_and_exit_status_2(module, args, says):
    done = command(module, *args.split())
    assert done.returncode == 2
    for part in says:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "field", "value"),
    [
        (["--use_clip=True"], "use_clip", True),
        (["--use_clip", "true"], "use_clip", True),
        (["--use-clip", "TRUE"], "use_clip", True),
        (["--use-clip=true"], "use_clip", True),
        (["--use_clip"], "use_clip", True),
        (["--use_std_norm=False"], "use_std_norm", False),
        (["--use_std_norm", "false"], "use_std_norm", False),
        (["--no_std_norm"], "use_std_norm", False),
    ],
)
def test_a_switch_is_set_in_every_usual_way(args, field, value):
    assert getattr(options(*args, "--lr", "0.5"), field) is value
    assert options(*args, "--lr", "0.5").lr == 0.5


def test_a_runs_config_is_a_config_file(tmp_path):
    saved = Config(lr=1e-3, use_clip=True, lora_target_modules=("q_proj",))
    write_config(tmp_path, saved, {})
    assert options("--config", f"{tmp_path}/config.json", "--lora_r", "4") == dataclasses.replace(
        saved, lora_r=4
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSONDecodeError.*is Python"),
        ("[1]", "is Python"),
        ('{"lr": 1}', "'config'.*is Python"),
        ('{"config": 3}', "is Python"),
        ('{"config": {"rank": 3}}', "another version.*Python"),
    ],
)
def test_json_that_is_no_runs_config_is_told(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=said):
        options("--config", f"{tmp_path}/config.json")
