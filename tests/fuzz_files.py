"""Configs, command lines, replies and files, right but for a few places (see fuzz.py)."""

import contextlib
import dataclasses
import io
import json
import math
import struct
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from flax import nnx
from fuzz_answers import edits, mutated
from hypothesis import strategies as st
from safetensors.numpy import save

from jgrpo import cli
from jgrpo.checks import without_effect
from jgrpo.config import PROJECTIONS, Config, load_config
from jgrpo.errors import InputError, RunError
from jgrpo.policy import adapter
from jgrpo.policy.lora import LoRAParam
from jgrpo.rollout import replies
from jgrpo.run import rundir
from jgrpo.study import compare


def attempt(read: Callable[[], Any], *errors: type[BaseException]) -> tuple[Any, Any]:
    """What `read` returns and None, or None and the error, which must be one that it may raise."""
    try:
        return read(), None
    except errors as error:
        return None, error


# -- config and command line -----------------------------------------------------------------------

json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from((0, 1, -1, 2, 8, 512, 513, 10**400, 1e308, "", "\x00", "1", "None", True)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
some_fields = st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True)
options = some_fields.flatmap(
    lambda names: st.fixed_dictionaries(
        {name: json_values | st.just(FIELDS[name].default) for name in names}
    )
)


def a_config_is_made_or_refused(values: dict[str, Any]) -> None:
    config, error = attempt(lambda: Config(**values), InputError)
    if error:
        assert any(name in str(error) for name in values)
        return
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    for name, field in FIELDS.items():
        if field.type is float:
            assert math.isfinite(float(getattr(config, name)))
    assert config.n_updates > 0
    assert config.rollout == "jax" or config.vllm_max_lora_rank >= config.lora_r
    assert isinstance(without_effect(config), list)


words = st.one_of(
    st.sampled_from([f"--{name}" for name in FIELDS]),
    st.sampled_from(("--no_use_clip", "--resume", "--dry_run", "--no_std_norm", "--", "-h", "--x")),
    st.sampled_from(("0", "1", "-1", "8", "0.5", "1e-5", "nan", "inf", "True", "False", "None",
                     "jax", "q_proj", "", "9" * 5000, "--lr=1", "\N{ARABIC-INDIC DIGIT THREE}")),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6),
)  # fmt: skip


def a_command_line_is_read_or_refused(words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command, error = attempt(lambda: cli.parse(cli.Train, words), InputError, SystemExit)
    if isinstance(error, SystemExit):  # tyro: help, or what is wrong with the flags
        assert error.code in (0, 2)
    else:
        assert isinstance(command, cli.Train) or str(error)


TEMPORARY = tempfile.TemporaryDirectory(prefix="jgrpo-fuzz-")


def folder() -> Path:
    return Path(TEMPORARY.name)


CONFIG_FILE = "from jgrpo.config import Config\n\nconfig = Config(lora_r=4, lr=1e-05, seed=42)\n"
# Config files are executed: nothing is put in that could become a call of anything.
HARMLESS = (
    "",
    "(",
    ")",
    "=",
    ",",
    ".",
    "\n",
    " ",
    "'",
    "\\",
    "\x00",
    "\N{SNOWMAN}",
    "\ud8ff",
    "(" * 300,
)


def a_config_file_is_read_or_refused(changes: list) -> None:
    file = folder() / "config.py"
    file.write_bytes(mutated(CONFIG_FILE, changes).encode("utf-8", "surrogatepass"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, error = attempt(lambda: load_config(file), InputError)
    assert isinstance(config, Config) or str(file) in str(error)


# -- JSON, right but for a few places ------------------------------------------------------------

Change = tuple[int, str, Any]
changes_of_json = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from(("replace", "remove", "double")), json_values),
    max_size=3,
)
breaks = st.one_of(
    st.just([]), edits(st.sampled_from((*'{}[],:"0\\ \n', "NaN", "1e999", "\ud800", "[" * 60_000)))
)


mutated_json = st.tuples(changes_of_json, breaks)


def changed(value: Any, changes: list[Change]) -> Any:
    """A copy of a JSON value with some of its parts replaced, removed or doubled."""
    value = json.loads(json.dumps(value))
    for place, what, new in changes:
        places: list[tuple[Any, Any]] = []
        queue = [value]
        while queue:
            node = queue.pop()
            if isinstance(node, dict | list):
                keys = list(node) if isinstance(node, dict) else range(len(node))
                places += [(node, key) for key in keys]
                queue += [node[key] for key in keys]
        if not places:
            return new
        node, key = places[place % len(places)]
        if what == "replace":
            node[key] = new
        elif what == "remove":
            del node[key]
        elif isinstance(node, list):
            node.append(node[key])
        else:
            node[f"{key}_"] = node[key]
    return value


def in_json(value: Any, breaks: list) -> bytes:
    return mutated(json.dumps(value), breaks).encode("utf-8", "surrogatepass")


ASKED = {"model": "m", "prompt": [5, 9], "n": 2, "max_tokens": 4, "stop_token_ids": [1]}
REPLY = {
    "model": "m",
    "choices": [
        {"index": 1, "token_ids": [7, 8, 9, 2], "prompt_token_ids": [5, 9],
         "logprobs": {"token_logprobs": [-0.5, -1.5, -2.5, 0.0]}, "finish_reason": "length"},
        {"index": 0, "token_ids": [7, 1], "prompt_token_ids": [5, 9],
         "logprobs": {"token_logprobs": [-0.5, -9998.0]}, "finish_reason": "stop"},
    ],
}  # fmt: skip


def a_reply_is_used_whole_or_refused(drawn: tuple[list, list, int]) -> None:
    changes, breaks, status = drawn
    content = in_json(changed(REPLY, changes), breaks)
    request = httpx.Request("POST", "http://server/v1/completions")
    response = httpx.Response(status, content=content, request=request)
    read = lambda: replies.completions_of(replies.json_of(response), ASKED, 300)  # noqa: E731
    found, error = attempt(read, RunError, ValueError, replies.Retry)
    if error:
        assert str(error)
        return
    assert (status, len(found)) == (200, 2)
    for completion in found:
        ids, logprobs = completion.token_ids, completion.logprobs
        assert 0 < len(ids) == len(logprobs) <= 4
        assert all(type(i) is int and i >= 0 for i in ids)
        assert np.isfinite(np.array(logprobs, np.float32)).all()
        assert completion.finish_reason == ("stop" if ids[-1] == 1 else "length")


PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"],
    "bias": "none", "use_rslora": True, "modules_to_save": None, "rank_pattern": {},
}  # fmt: skip


def an_adapter_config_is_read_or_refused(drawn: tuple[list, list]) -> None:
    (folder() / adapter.CONFIG_FILE).write_bytes(in_json(changed(PEFT, drawn[0]), drawn[1]))
    config, error = attempt(lambda: adapter.read_config(folder()), InputError)
    if error:
        assert adapter.CONFIG_FILE in str(error) or adapter.WEIGHTS_FILE in str(error)
        return
    assert type(config.rank) is int
    assert min(config.rank, config.alpha) > 0
    assert math.isfinite(float(config.alpha))
    assert set() < set(config.target_modules) <= set(PROJECTIONS)


@cache
def empty_adapter() -> nnx.State:
    path = ("model", "layers", "self_attn", "q_proj")
    arrays = {"lora_A": np.zeros((2, 3, 2), np.float32), "lora_B": np.zeros((2, 2, 4), np.float32)}
    return nnx.from_flat_state([((*path, k), LoRAParam(a)) for k, a in arrays.items()])


@cache
def good_weights() -> tuple[dict, bytes]:
    """Header and data of a safetensors file that fits `empty_adapter`."""
    filled = [(p, x.replace(x[...] + 0.5)) for p, x in nnx.to_flat_state(empty_adapter())]
    content = save(adapter.adapter_arrays(nnx.from_flat_state(filled)))
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


DTYPES = ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X")
weight_files = st.tuples(
    changes_of_json, breaks, st.sampled_from((0, 0, 0, 0, 1, -1, 2**40)),
    st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=8)), max_size=2),
    st.integers(0, 900) | st.none(), st.sampled_from((None, None, *DTYPES)),
)  # fmt: skip


def adapter_weights_fit_or_are_refused(drawn: tuple) -> None:
    changes, breaks, length_error, patches, cut, dtype = drawn
    header, data = good_weights()
    for at, new in patches:
        data = data[:at] + new + data[at + len(new) :]
    header = changed(header, changes)
    if dtype and isinstance(header, dict):  # the same bytes as another type, in one tensor
        tensor = next((t for t in header.values() if isinstance(t, dict) and "dtype" in t), {})
        tensor["dtype"] = dtype
    head = in_json(header, breaks)
    size = struct.pack("<Q", max(0, len(head) + length_error))
    (folder() / adapter.WEIGHTS_FILE).write_bytes((size + head + data)[:cut])
    loaded, error = attempt(lambda: adapter.load(folder(), empty_adapter()), InputError)
    if error:
        assert adapter.WEIGHTS_FILE in str(error)
        return
    leaves = [nnx.to_flat_state(state) for state in (loaded, empty_adapter())]
    for (_, leaf), (_, like) in zip(*leaves, strict=True):
        assert leaf.shape == like.shape
        assert np.isfinite(leaf[...]).all()


METRICS = [
    {"step": k, "train/loss": 0.5 / k, "train/kl": None, "time/step": 1.0} for k in (1, 2, 3)
]
run_files = st.tuples(
    st.lists(changes_of_json, min_size=3, max_size=3), breaks, st.integers(0, 400)
)


def metrics_are_read_or_refused(drawn: tuple[list[list], list, int]) -> None:
    changes, breaks, cut = drawn
    lines = [json.dumps(changed(row, c)) for row, c in zip(METRICS, changes, strict=True)]
    text = mutated("\n".join(lines) + "\n", breaks)
    file = folder() / "metrics.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    rows, error = attempt(lambda: rundir.read_metrics(folder()), InputError)
    if error:
        assert "metrics.jsonl, line" in str(error)
    else:
        assert all(type(row["step"]) is int for row in rows)
    # Torn in mid-write: the lines that are whole, and no others.
    whole = "".join(map(rundir.json_line, METRICS))
    file.write_text(whole[:cut])
    n_whole = sum(cut >= len("".join(map(rundir.json_line, METRICS[:k]))) - 1 for k in (1, 2, 3))
    assert rundir.read_metrics(folder()) == METRICS[:n_whole]


ROLLOUT = {"prompt_ids": [1, 2], "completion": "x", "token_ids": [3], "reward": 1.0}


def rollouts_are_read_or_refused(drawn: tuple[list[list], list, int]) -> None:
    changes, breaks, _ = drawn
    lines = [json.dumps(changed(ROLLOUT, c)) for c in changes[:2]]
    file = folder() / "step_000001.jsonl"
    file.write_bytes(mutated("\n".join(lines) + "\n", breaks).encode("utf-8", "surrogatepass"))
    rows, error = attempt(lambda: compare.read_rollouts(file, 2), InputError)
    if error:
        assert str(file) in str(error)
    else:
        assert all(isinstance(row, dict) for row in rows)
        assert rows[0]["prompt_ids"] == rows[1]["prompt_ids"]


def a_run_s_config_is_read_or_refused(drawn: tuple[list, list]) -> None:
    content = {"config": dataclasses.asdict(Config()), "seed": 42}
    (folder() / "config.json").write_bytes(in_json(changed(content, drawn[0]), drawn[1]))
    config, error = attempt(lambda: cli.resumed_config(folder()), InputError)
    assert isinstance(config, Config) or str(error)
