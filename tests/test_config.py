"""jgrpo.config: what a config may hold, what it says about what it may not, and the files."""

import dataclasses
import math
from pathlib import Path

import pytest

from jgrpo import cli
from jgrpo.checks import READ_WHERE, unread, without_effect
from jgrpo.config import PATHS, PROJECTIONS, Config, load_config
from jgrpo.errors import InputError
from jgrpo.update.learner import loss_of, needs_ref, pulls_without_advantage

CONFIGS = Path(__file__).parent.parent / "configs"

# The design's defaults (section 4), which are those of the PyTorch study.
STUDY = {
    "model_id": "Qwen/Qwen3-1.7B", "lora_r": 1, "lora_alpha": 32, "lr": 9e-5, "n_grpo_steps": 50,
    "n_prompts_per_step": 32, "group_size": 8, "epochs_per_step": 1, "seed": 42,
    "use_std_norm": True, "use_kl_penalty": False, "beta": 0.04, "use_clip": False,
    "clip_eps": 0.2, "use_token_level_loss": False, "use_length_penalty": False,
    "expected_maximum_length": 1024, "overlong_cache": 512,
    "dataset_path": "qwedsacf/competition_math", "prompt_template": "boxed.prompt",
    "vllm_url": "http://localhost:8000", "max_tokens": 1024, "temperature": 1.0,
    "base_dir": "runs", "eval_every": 5, "n_eval_prompts": 1000, "rollout": "vllm",
}  # fmt: skip

BAD = [
    ("lora_r", 0), ("lora_r", -1), ("lora_r", 1.5), ("lora_r", True), ("lora_r", 513),
    ("lora_alpha", 0.0), ("lora_alpha", math.inf), ("lora_alpha", "32"),
    ("lr", 0.0), ("lr", -1e-5), ("lr", math.nan), ("lr", "1e-4"), ("lr", None),
    ("n_grpo_steps", 0), ("n_prompts_per_step", 0), ("group_size", 0), ("group_size", 1),
    ("epochs_per_step", 0), ("micro_batch_size", 0), ("micro_batch_size", 2.0),
    ("seed", -1), ("seed", 2**31), ("eval_every", -1), ("checkpoint_every", 0),
    ("beta", -0.1), ("beta", math.nan), ("clip_eps", 0.0), ("clip_eps", 1.0),
    ("use_clip", 1), ("use_std_norm", "no"),
    ("expected_maximum_length", 0), ("overlong_cache", -1), ("overlong_cache", 1025),
    ("max_tokens", 0), ("max_prompt_tokens", 0), ("temperature", 0.0), ("temperature", -1.0),
    ("n_eval_prompts", 0), ("grader_timeout_s", 0.0), ("grader_workers", 0),
    ("vllm_timeout_s", -5.0), ("vllm_move_s", 0.0), ("max_logprob_diff", 0.0),
    ("max_mean_logprob_diff", 0.0), ("max_mean_logprob_diff", math.nan),
    ("attn_implementation", "flash"), ("dtype", "float8"), ("rollout", "sglang"),
    ("model_id", 7), ("run_dir", None),
    ("vllm_url", "localhost:8000"), ("vllm_url", "http://a:1, b:2"), ("vllm_url", ""),
    ("lora_target_modules", ()), ("lora_target_modules", ("q_proj", "q_proj")),
    ("lora_target_modules", ("lm_head",)), ("lora_target_modules", "q_proj"),
    ("lora_target_modules", 3),
    ("loss_type", "ppo"), ("use_leave_one_out", 1), ("kl_to", "ref"), ("kl_estimator", "k4"),
    ("clip_eps_high", 0.0), ("clip_eps_high", -0.1), ("clip_eps_high", math.nan),
    ("cispo_max_ratio", 0.0), ("importance_weight_cap", -2.0), ("entropy_coef", -0.01),
    ("entropy_coef", math.nan), ("updates_per_epoch", 0), ("updates_per_epoch", 3),
    ("lr_scheduler_type", "step"), ("warmup_steps", -1), ("warmup_steps", 50),
    ("warmup_steps", 0.1), ("max_sampling_rounds", 0), ("process_reward_weight", -0.1),
    ("process_reward_weight", 1.1), ("prm_batch_size", 0),
    ("reward_function", "mine"), ("reward_function", "mine.py:"), ("reward_function", ":f"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda x: repr(x))
def test_a_bad_value_is_refused_with_its_field_and_the_value(field, value):
    with pytest.raises(InputError) as error:
        Config(**{field: value})
    lines = str(error.value).splitlines()[1:]
    named = [line for line in lines if line.strip().startswith(f"{field}=")]
    assert len(named) == 1
    assert repr(value) in named[0]
    # the requirement or the remedy comes with it
    assert any(word in named[0] for word in ("must", "at most", "use "))


def test_all_bad_fields_are_told_at_once():
    with pytest.raises(InputError) as error:
        Config(lora_r=0, clip_eps=7.0, rollout="jax", vllm_url="not looked at", temperature=-1.0)
    text = str(error.value)
    assert [text.count(f"{f}=") for f in ("lora_r", "clip_eps", "temperature")] == [1, 1, 1]
    assert "vllm_url" not in text  # nothing of vLLM matters to the embedded sampler
    with pytest.raises(InputError) as error:
        Config(lr="x", seed="y", dtype="z")  # types are told together as well
    assert all(f"{f}=" in str(error.value) for f in ("lr", "seed", "dtype"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("overlong_cache", 0), ("overlong_cache", 1024), ("eval_every", 0), ("seed", 2**31 - 1),
     ("beta", 0.0), ("group_size", 2), ("lora_r", 512), ("lora_alpha", 1), ("clip_eps_high", 3.0),
     ("updates_per_epoch", 32), ("warmup_steps", 49), ("entropy_coef", 0.0),
     ("process_reward_weight", 0), ("process_reward_weight", 1.0), ("max_sampling_rounds", 1)],
)  # fmt: skip
def test_values_at_the_edge_are_accepted(field, value):
    assert getattr(Config(**{field: value}), field) == value


def test_defaults_are_the_study_s():
    config = Config()
    assert {name: getattr(config, name) for name in STUDY} == STUDY
    assert set(config.lora_target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj",
    }  # fmt: skip
    assert config.n_completions_per_step == 256  # 32 x 8
    assert (config.updates_per_rollout, config.n_updates) == (1, 50)


def test_flash_attention_wants_16_bits():
    Config(attn_implementation="cudnn", dtype="bfloat16")
    Config(attn_implementation="cudnn", dtype="float16")
    with pytest.raises(InputError, match="attn_implementation=cudnn: needs dtype=bfloat16"):
        Config(attn_implementation="cudnn", dtype="float32")


def test_updates_are_counted_over_epochs_and_their_parts():
    config = Config(n_grpo_steps=10, epochs_per_step=3, updates_per_epoch=4, warmup_steps=119)
    assert (config.updates_per_rollout, config.n_updates) == (12, 120)
    with pytest.raises(InputError, match="warmup_steps=120: must be below the 120 updates"):
        dataclasses.replace(config, warmup_steps=120)
    with pytest.raises(InputError, match="updates_per_epoch=8: must divide n_prompts_per_step=12"):
        Config(n_prompts_per_step=12, updates_per_epoch=8)


@pytest.mark.parametrize(
    ("rank", "admitted"),
    [(1, 1), (2, 8), (4, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (65, 128), (129, 256),
     (257, 320), (321, 512), (512, 512)],
)  # fmt: skip
def test_vllm_gets_the_smallest_rank_it_admits(rank, admitted):
    assert Config(lora_r=rank).vllm_max_lora_rank == admitted


def test_only_the_server_limits_the_rank():
    assert Config(lora_r=600, rollout="jax").lora_r == 600


def test_urls_are_split_and_cleaned():
    config = Config(vllm_url="http://a:1/, https://b:2")
    assert config.vllm_urls == ("http://a:1", "https://b:2")


def test_a_config_cannot_be_changed_and_survives_json():
    config = Config(lora_target_modules=["q_proj", "v_proj"])
    assert config.lora_target_modules == ("q_proj", "v_proj")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    assert Config(**dataclasses.asdict(config)) == config


# -- config files -----------------------------------------------------------------------------


# What each file changes of rank1.py, the study's best design; its docstring says the same in words.
# Where the clip's lower width or the KL's weight is a default, only the switch changes.
CHANGES = {
    "rank4": {"lora_r": 4},
    "rank16": {"lora_r": 16},
    "clip": {"use_clip": True},
    "kl": {"use_kl_penalty": True},
    "kl_base": {"use_kl_penalty": True, "kl_to": "base"},
    "token_level": {"use_token_level_loss": True},
    "no_std_norm": {"use_std_norm": False},
    "length_penalty": {"use_length_penalty": True},
    "prm": {"use_prm": True},
    "four_updates": {"updates_per_epoch": 4},
    "dapo": {
        "use_clip": True, "clip_eps_high": 0.28, "use_token_level_loss": True,
        "use_dynamic_sampling": True, "use_length_penalty": True,
    },
    "dr_grpo": {"loss_type": "dr_grpo", "use_std_norm": False},
    "gspo": {"loss_type": "gspo", "use_clip": True, "clip_eps": 3e-4, "clip_eps_high": 4e-4},
    "cispo": {"loss_type": "cispo"},
    "rloo": {"loss_type": "rloo", "use_leave_one_out": True, "use_std_norm": False},
    "dual_clip": {"use_clip": True, "clip_delta": 3.0, "updates_per_epoch": 4},
    "kl_weighted": {"use_kl_penalty": True, "kl_to": "base", "use_weighted_kl": True,
                    "updates_per_epoch": 4},
    "masked_weights": {"use_importance_weights": True, "importance_weight_mode": "sequence_mask"},
    "sapo": {"loss_type": "sapo", "updates_per_epoch": 4},
    "dppo": {"loss_type": "dppo", "updates_per_epoch": 4},
    "field": {"lora_alpha": 2, "lr": 4e-5, "use_std_norm": False, "use_token_level_loss": True,
              "use_importance_weights": True},
}  # fmt: skip


def test_rank1_is_the_study_s_best_design():
    # Its defaults are Config's (above); recomputation makes room, and changes no number.
    assert load_config(CONFIGS / "rank1.py") == Config(gradient_checkpointing=True)


@pytest.mark.parametrize("name", CHANGES)
def test_a_config_file_changes_what_it_says_of_rank1_and_nothing_else(name):
    fields, changed = (
        dataclasses.asdict(load_config(CONFIGS / f"{file}.py")) for file in ("rank1", name)
    )
    assert {k: v for k, v in changed.items() if v != fields[k]} == CHANGES[name]
    says = "What the field uses" if name == "field" else "rank1.py with "
    assert (CONFIGS / f"{name}.py").read_text("utf-8").startswith(f'"""{says}')


def test_every_config_file_is_in_the_table_and_loads():
    files = {file.stem: load_config(file) for file in CONFIGS.glob("*.py")}
    assert files.keys() == CHANGES.keys() | {"rank1", "tiny", "tiny_long", "smollm2"}
    assert all(isinstance(config, Config) for config in files.values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config = (", "SyntaxError"),
        ("import nosuchmodule", "nosuchmodule"),
        ("1 / 0", "ZeroDivisionError"),
        ("configuration = 3", "must define `config = "),
        ("config = {'lr': 1e-4}", "must define `config = "),
        ("from jgrpo.config import Config\nconfig = Config(lr=-1.0)", "lr=-1.0: must be positive"),
        ("from jgrpo.config import Config\nconfig = Config(learning_rate=1.0)", "learning_rate"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_its_name(text, says, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(file)
    assert str(file) in str(error.value)
    assert says in str(error.value)


def test_a_missing_file_is_told_with_its_name(tmp_path):
    for path in (tmp_path / "nothing.py", tmp_path):
        with pytest.raises(InputError, match="no such file") as error:
            load_config(path)
        assert str(path) in str(error.value)


def test_projections_are_all_that_a_layer_has():
    assert len(PROJECTIONS) == len(set(PROJECTIONS)) == 7


# -- options beside each other ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"loss_type": "cispo", "use_clip": True}, "use_clip with loss_type=cispo"),
        ({"loss_type": "dr_grpo", "use_token_level_loss": True},
         "use_token_level_loss with loss_type=dr_grpo"),
        ({"loss_type": "rloo", "use_token_level_loss": True},
         "use_token_level_loss with loss_type=rloo"),
        ({"loss_type": "gspo", "use_importance_weights": True},
         "use_importance_weights with loss_type=gspo"),
        ({"loss_type": "rloo", "use_importance_weights": True},
         "use_importance_weights with loss_type=rloo"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_with_both_names(fields, names):
    with pytest.raises(InputError) as error:
        Config(**fields)
    [line] = str(error.value).splitlines()[1:]
    assert line.strip().startswith(names)
    for name, value in fields.items():  # and each of the two alone is fine
        assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({}, []),
        ({"use_clip": True}, ["use_clip"]),
        ({"use_kl_penalty": True}, ["use_kl_penalty (kl_to=old)"]),
        ({"use_kl_penalty": True, "kl_to": "base"}, []),
        ({"loss_type": "cispo"}, ["loss_type=cispo's cap"]),
        ({"loss_type": "cispo", "cispo_max_ratio": 0.5}, []),  # halves every token's gradient
        ({"loss_type": "sapo"}, ["loss_type=sapo's bound"]),
        ({"loss_type": "rloo"}, ["--use_leave_one_out --no_std_norm"]),
        ({"loss_type": "rloo", "use_leave_one_out": True}, ["--no_std_norm"]),
        ({"loss_type": "rloo", "use_leave_one_out": True, "use_std_norm": False}, []),
        ({"use_clip": True, "use_kl_penalty": True}, ["use_clip and use_kl_penalty"]),
        ({"use_clip": True, "use_kl_penalty": True, "epochs_per_step": 2}, []),
        ({"use_clip": True, "use_kl_penalty": True, "updates_per_epoch": 2}, []),
        ({"loss_type": "cispo", "updates_per_epoch": 2}, []),
        ({"use_kl_penalty": True, "kl_to": "base", "kl_estimator": "k1"}, ["kl_estimator=k1"]),
        ({"use_kl_penalty": True, "kl_to": "base", "kl_estimator": "k1", "use_weighted_kl": True},
         []),
        ({"use_kl_penalty": True, "kl_to": "base", "kl_estimator": "k1", "updates_per_epoch": 2},
         ["at the first update of a rollout"]),
        ({"kl_to": "base", "kl_estimator": "k1"}, ["kl_to, kl_estimator: read only with"]),
        ({"beta": 0.1}, ["beta: read only with --use_kl_penalty"]),
        ({"clip_eps": 0.1, "clip_eps_high": 0.3}, ["clip_eps, clip_eps_high: read only with"]),
        ({"max_sampling_rounds": 9, "prm_batch_size": 2}, ["max_sampling_rounds", "prm_batch"]),
        ({"loss_type": "dr_grpo"}, ["--no_std_norm"]),
        ({"loss_type": "dr_grpo", "use_std_norm": False}, []),
        ({"use_length_penalty": True, "max_tokens": 512}, ["use_length_penalty"]),
        ({"use_length_penalty": True, "max_tokens": 513}, []),
        ({"use_length_penalty": True, "max_tokens": 512, "use_clip": True, "loss_type": "dr_grpo"},
         ["use_clip", "--no_std_norm", "use_length_penalty"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_technique_that_cannot_change_anything_is_warned_of(fields, warned):
    warnings = without_effect(Config(**fields))
    assert len(warnings) == len(warned)
    assert all(name in line for name, line in zip(warned, warnings, strict=True))


def test_the_config_files_that_are_warned_of_are_known():
    # With one update a rollout neither clip nor cap nor KL to the old policy can bind.
    warned = {file.stem for file in CONFIGS.glob("*.py") if without_effect(load_config(file))}
    # The tiny ones set the lengths that --use_length_penalty would read.
    assert warned == {"clip", "kl", "cispo", "gspo", "dapo", "tiny", "tiny_long"}


def test_every_option_that_may_be_idle_is_named_exactly_while_nothing_reads_it():
    """Over all fields: of what is read here and there, the default is never named, another value is
    named where its condition fails, and no more where it holds."""
    asked = {
        "beta": {"use_kl_penalty": True},
        "kl_to": {"use_kl_penalty": True},
        "kl_estimator": {"use_kl_penalty": True},
        "use_weighted_kl": {"use_kl_penalty": True, "kl_to": "base"},
        "clip_eps": {"use_clip": True},
        "clip_eps_high": {"use_clip": True},
        "clip_delta": {"use_clip": True},
        "cispo_max_ratio": {"loss_type": "cispo"},
        "sapo_tau_positive": {"loss_type": "sapo"},
        "sapo_tau_negative": {"loss_type": "sapo"},
        "dppo_max_difference": {"loss_type": "dppo"},
        "importance_weight_cap": {"use_importance_weights": True},
        "importance_weight_mode": {"use_importance_weights": True},
        "max_sampling_rounds": {"use_dynamic_sampling": True},
        "expected_maximum_length": {"use_length_penalty": True},
        "overlong_cache": {"use_length_penalty": True},
        "process_reward_weight": {"use_prm": True},
        "prm_model_id": {"use_prm": True},
        "prm_batch_size": {"use_prm": True},
        "reward_weights": {"reward_function": ("a:f",)},
        "vllm_url": {"rollout": "vllm"},
        "vllm_timeout_s": {"rollout": "vllm"},
        "check_stale": {"rollout": "vllm"},
        "vllm_move_s": {"rollout": "vllm", "vllm_url": "http://x:1,http://x:2"},
        "base_dir": {"run_dir": ""},
        "project": {"report_to": ("wandb",)},
        "pass_rate_file": {"pass_rate": (0.2, 0.8)},
        "use_token_level_loss": {"loss_type": "grpo"},
    }
    off = {"vllm_url": {"rollout": "jax"}, "vllm_timeout_s": {"rollout": "jax"},
           "check_stale": {"rollout": "jax"},
           "vllm_move_s": {"rollout": "vllm"},
           "base_dir": {"run_dir": "x"}, "use_token_level_loss": {"loss_type": "cispo"},
           }  # fmt: skip
    other = {"kl_to": "base", "kl_estimator": "k2", "clip_eps_high": 0.5, "clip_delta": 3.0,
             "importance_weight_mode": "token_mask", "reward_weights": (0.5,),
             "vllm_url": "http://x:1", "prm_model_id": "x", "base_dir": "y",
             "project": "p", "pass_rate_file": "f", "check_stale": False}  # fmt: skip
    assert asked.keys() == READ_WHERE.keys()
    assert READ_WHERE.keys() <= {f.name for f in dataclasses.fields(Config)}
    assert unread(Config()) == []
    for name, on in asked.items():
        default = next(f.default for f in dataclasses.fields(Config) if f.name == name)
        value = {name: other.get(name, not default if default is False else default)}
        if isinstance(default, int | float) and not isinstance(default, bool):
            value = {name: default / 2 if isinstance(default, float) else default + 1}
        [line] = unread(Config(**value, **off.get(name, {})))
        assert line.startswith(f"{name}: read only "), line
        assert unread(Config(**value, **on)) == [], name


class Reads(Config):
    """A config that writes down which of its fields are read."""

    def __getattribute__(self, name):
        if name in Config.__dataclass_fields__:
            Reads.seen.add(name)
        return super().__getattribute__(name)


def reads_of_the_loss(**options) -> set[str]:
    Reads.seen = set()
    config = Reads(**options)
    Reads.seen = set()
    loss_of(config), needs_ref(config), pulls_without_advantage(config)
    return Reads.seen


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"use_kl_penalty": True, "kl_to": "base"}, {"beta", "kl_estimator", "use_weighted_kl"}),
        ({"use_clip": True}, {"clip_eps", "clip_eps_high", "clip_delta"}),
        ({"loss_type": "cispo"}, {"cispo_max_ratio"}),
        ({"loss_type": "sapo"}, {"sapo_tau_positive", "sapo_tau_negative"}),
        ({"loss_type": "dppo"}, {"dppo_max_difference"}),
        ({"use_importance_weights": True}, {"importance_weight_cap", "importance_weight_mode"}),
    ],
)
def test_the_loss_reads_what_the_table_says_and_when(options, names):
    assert names <= reads_of_the_loss(**options)
    assert not names & (reads_of_the_loss() - {"kl_estimator"})  # asked of the pull, by itself
    assert all(READ_WHERE[name][0](Config(**options)) for name in names)
    assert not any(READ_WHERE[name][0](Config()) for name in names)


def test_options_of_training_given_to_evaluate_are_named(capsys):
    cli.parse(cli.Evaluate, ["--lr", "1", "--n_eval_prompts", "7"])
    assert "note: lr: evaluation does not read it" in capsys.readouterr().err
    cli.parse(cli.Evaluate, ["--n_eval_prompts", "7"])
    assert capsys.readouterr().err == ""


def test_a_tilde_is_somebody_s_home_wherever_a_path_stands(monkeypatch, tmp_path):
    """A shell does not expand what follows a `=`, and a config file has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(**dict.fromkeys(PATHS, "~/a"))
    assert {getattr(config, name) for name in PATHS} == {str(tmp_path / "a")}
    assert Config(run_dir="a~").run_dir == "a~"
