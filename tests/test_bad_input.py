"""What a user can get wrong, each as the command meets it: exit status 2 and one message that names
the value and the remedy, before anything is sampled or trained, and nothing written.

A case is a command line in a folder where all is sound, and what is damaged there before it.
"""

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import OneLearner, as_main
from safetensors.numpy import load_file, save_file
from tiny_run import tiny_config, write_base, write_config_file, write_prm, write_problems

from jgrpo.policy import adapter as adapters
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.run import sampler, session
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.run.policy import open_policy
from jgrpo.run.rundir import json_line, write_config
from jgrpo.tiny.recipe import make_tokenizer
from jgrpo.update import learner

ROOT = Path(__file__).parent.parent
Damage = Callable[[Path], object]


class Case(NamedTuple):
    """What is damaged, the command, and words of the message."""

    damage: Damage
    line: str
    says: tuple[str, ...]


# -- damages: each takes the folder of the case -----------------------------------------------


def sound(root: Path) -> None:
    """Nothing is damaged; the command line is at fault."""


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content

    def damage(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return damage


def rows(*values: object, name: str = "train.jsonl") -> Damage:
    return write(name, "".join(json.dumps(value) + "\n" for value in values))


def config(text: str) -> Damage:
    return write("c.py", "from jgrpo.config import Config\n" + text)


def remove(name: str) -> Damage:
    return lambda root: (
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    )


def folder_for(name: str) -> Damage:
    return lambda root: (remove(name)(root) if (root / name).exists() else None,
                         (root / name).mkdir())  # fmt: skip


def cut(name: str, n_bytes: int) -> Damage:
    return lambda root: write(name, (root / name).read_bytes()[:n_bytes])(root)


def one_row_fewer(root: Path) -> None:
    file = root / "train.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))


def fields(name: str, **changes: object) -> Damage:
    """Change a JSON file's fields; None: leave the field out."""

    def damage(root: Path) -> None:
        content = json.loads((root / name).read_text()) | changes
        (root / name).write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )

    return damage


def tensors(name: str, edit: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(root: Path) -> None:
        arrays = load_file(root / name)
        edit(arrays)
        save_file(arrays, root / name)

    return damage


def put(key: str, index: object, value: float) -> Callable[[dict], None]:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays[key] = arrays[key].copy()
        arrays[key][index] = value

    return edit


def larger_tokenizer(root: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["fifty-first"])
    tokenizer.save_pretrained(root / "base")


def sharded_by(index: str) -> Damage:
    return both(remove(WEIGHTS), write("base/model.safetensors.index.json", index))


def both(*damages: Damage) -> Damage:
    return lambda root: [damage(root) for damage in damages]


def mode(name: str, bits: int) -> Damage:
    return lambda root: (root / name).chmod(bits)


def flipped(name: str) -> Damage:
    """Its last byte is another one."""

    def damage(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return damage


def every_file(folder: str, pattern: str, content: bytes) -> Damage:
    def damage(root: Path) -> None:
        found = [file for file in (root / folder).rglob(pattern) if file.is_file()]
        assert found
        for file in found:
            file.write_bytes(content)

    return damage


# -- the cases --------------------------------------------------------------------------------

TRAIN = "train --config c.py"
RESUME = "train --resume run"
EVALUATE = "evaluate --config c.py --adapter run/adapters/step_000002"
WEIGHTS = "base/model.safetensors"
UP, DOWN = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down"))
ADAPTER = "run/adapters/step_000002/adapter_model.safetensors"
ADAPTER_CONFIG = "run/adapters/step_000002/adapter_config.json"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAST = "run/checkpoints/000002"
GOOD = {"question": "What is 1 + 4?", "answer": "#### 5"}


def flags(line: str, *says: str) -> Case:
    return Case(sound, f"{TRAIN} {line}", says)


def of(damage: Damage, *says: str, line: str = TRAIN) -> Case:
    return Case(damage, line, says)


FLAGS = {
    "rank 0": flags("--lora_r 0", "lora_r=0: must be positive"),
    "rank 1.5": flags("--lora_r 1.5", "--lora_r", "1.5"),
    "rank above vLLM's": flags(
        "--rollout vllm --lora_r 513", "lora_r=513: vLLM admits at most 512; or --rollout jax"
    ),
    "alpha NaN": flags("--lora_alpha nan", "lora_alpha=nan: must be positive"),
    "lr infinite": flags("--lr inf", "lr=inf: must be finite"),
    "lr NaN": flags("--lr nan", "lr=nan: must be positive"),
    "lr negative": flags("--lr -1e-5", "lr=-1e-05: must be positive"),
    "lr a word": flags("--lr fast", "--lr", "fast"),
    "lr without value": flags("--lr", "--lr", "Missing value"),
    "config without value": of(sound, "--config", "Missing value", line="train --config"),
    "group of one": flags("--group_size 1", "a group of one has no advantage; use 2 or more"),
    "micro-batch 0": flags("--micro_batch_size 0", "micro_batch_size=0: must be positive"),
    "greedy rollouts": flags("--temperature 0", "temperature=0.0: must be positive"),
    "temperature NaN": flags("--temperature nan", "temperature=nan: must be positive"),
    "steps as a float": flags("--n_grpo_steps 1e3", "--n_grpo_steps", "1e3"),
    "a length beyond the model's": flags(
        "--max_tokens 500", "max_prompt_tokens=18 and max_tokens=500", "max_position_embeddings=256"
    ),
    "a number beyond int32": flags("--max_tokens 99999999999", "must be below 2**31"),
    "more processes than there can be": flags(
        "--grader_workers 100000", "grader_workers=100000: must be at most 256"
    ),
    "no folder for runs": flags("--base_dir=", "base_dir='': must not be empty"),
    "negative size": flags("--max_tokens -5", "max_tokens=-5: must be positive"),
    "seed negative": flags("--seed -1", "seed=-1: must not be negative"),
    "seed too large": flags("--seed 2147483648", "seed=2147483648: must", "below 2**31"),
    "not a projection": flags("--lora_target_modules lm_head", "'lm_head'", "q_proj"),
    "a projection twice": flags("--lora_target_modules q_proj q_proj", "at most once"),
    "bad dtype": flags("--dtype float8", "--dtype", "float8", "float16", "bfloat16"),
    "bad sampler": flags("--rollout sglang", "--rollout", "sglang", "vllm"),
    "unknown flag": flags("--learning_rate 1e-4", "--learning_rate"),
    "updates that do not divide": flags(
        "--updates_per_epoch 3", "updates_per_epoch=3: must divide n_prompts_per_step=4"
    ),
    "warm-up too long": flags("--warmup_steps 4", "warmup_steps=4: must be below the 4 updates"),
    "clip range": flags("--clip_eps 1.5", "clip_eps=1.5: must be between 0 and 1"),
    "weight above 1": flags("--process_reward_weight 2", "must be between 0 and 1"),
    "cache beyond length": flags("--overlong_cache 2000", "must not exceed", "=1024"),
    "contradiction": flags("--loss_type cispo --use_clip", "use_clip with loss_type=cispo"),
    "NaN threshold": flags("--max_logprob_diff nan", "max_logprob_diff=nan: must be positive"),
    "flash attention here": flags(
        "--attn_implementation cudnn --dtype bfloat16", "cudnn needs a GPU, JAX has cpu; take xla"
    ),
    "no scheme": flags("--rollout vllm --vllm_url localhost:8000", "http://"),
    "no host": flags("--rollout vllm --vllm_url http://", "vllm_url='http://'", "http://HOST:PORT"),
    "no such port": flags("--rollout vllm --vllm_url http://h:99999", "http://HOST:PORT"),
    "a word as port": flags("--rollout vllm --vllm_url http://h:eight", "http://HOST:PORT"),
    "a path too much": flags("--rollout vllm --vllm_url http://h:1/v1", "http://HOST:PORT"),
    "reward without name": flags("--reward_function r.py", "must be file.py:function"),
    "reward file missing": flags("--reward_function r.py:f", "no such file: r.py"),
    "reward module missing": flags("--reward_function no_module:f", "No module named"),
    "model id empty": Case(sound, f"{TRAIN} --model_id=", ("model_id=''", "must not be empty")),
    "data set path empty": Case(sound, f"{TRAIN} --dataset_path=", ("dataset_path=''",)),
    "template name empty": Case(sound, f"{TRAIN} --prompt_template=", ("prompt_template=''",)),
}
FILES = {
    "config missing": of(sound, "--config no.py: no such file", line="train --config no.py"),
    "config a folder": of(folder_for("c.py"), "--config c.py: no such file"),
    "config without config": of(write("c.py", "lr = 1\n"), "must define `config = "),
    "config a class": of(config("config = Config"), "must define `config = "),
    "config a dict": of(write("c.py", "config = {'lr': 1}"), "must define `config = "),
    "syntax error": of(config("config = Config(\n"), "c.py: SyntaxError", "line 2"),
    "an exception": of(config("x = 1\nx / 0\n"), "c.py", "line 3: ZeroDivisionError"),
    "an import": of(write("c.py", "import no_such_module"), "c.py", "No module named"),
    "it exits": of(write("c.py", "raise SystemExit(0)"), "c.py", "SystemExit"),
    "not UTF-8": of(write("c.py", b"x = '\xff\xfe'\n"), "c.py", "utf-8"),
    "binary": of(write("c.py", b"\x00\x01"), "c.py", "null bytes"),
    "field of another type": of(
        config("config = Config(lr='1e-4')"), "lr='1e-4': must be of type float"
    ),
    "all wrong fields": of(
        config("config = Config(lora_r=0, lr=-1.0)"), "lora_r=0: must be", "lr=-1.0: must be"
    ),
    "unknown field": of(config("config = Config(learning_rate=1)"), "learning_rate"),
    "reward raises": of(
        write("r.py", "import no_such"), "r.py:f", 'File "r.py", line 1', "no_such",
        line=f"{TRAIN} --reward_function r.py:f"
    ),
    "reward not defined": of(
        write("r.py", "x = 1"), "r.py defines no f", line=f"{TRAIN} --reward_function r.py:f"
    ),
    "reward without **": of(
        write("r.py", "def f(a): pass"), "it needs a, but it is given the keywords prompts",
        line=f"{TRAIN} --reward_function r.py:f",
    ),
}  # fmt: skip
DATA = {
    "missing": of(remove("train.jsonl"), "data set train.jsonl: no such file or folder"),
    "eval missing": of(remove("eval.jsonl"), "data set eval.jsonl: no such file or folder"),
    "an empty folder": of(folder_for("train.jsonl"), "folder train.jsonl", "give a .jsonl"),
    "empty": of(write("train.jsonl", ""), "data set train.jsonl: has no rows"),
    "blank lines": of(write("train.jsonl", "\n \n\n"), "data set train.jsonl: has no rows"),
    "an empty list": of(
        write("t.json", "[]"), "data set t.json: has no rows", line=f"{TRAIN} --dataset_path t.json"
    ),
    "other columns": of(
        rows({"prompt": "1 + 1?", "completion": "2"}),
        "training rows have the columns 'prompt', 'completion'", "'problem' and 'solution'",
    ),
    "problem not text": of(
        rows({"question": ["1 + 1?"], "answer": "2"}),
        "no training problem is left", "the problem is empty or not text: 1 rows (train[0])",
    ),
    "half a surrogate pair": of(
        rows({"question": "\ud800 + 1?", "answer": "2"}),
        "no training problem is left", "half a surrogate pair, which is no text",
    ),
    "problem empty": of(rows({"question": "  ", "answer": "2"}), "the problem is empty"),
    "nothing boxed": of(
        rows({"problem": "1 + 1?", "solution": "It is 2."}),
        "no training problem is left", "no \\boxed{} with something in it in the solution: 1 rows",
    ),
    "JSON cut in line 3": of(
        write("train.jsonl", '{"a": 1}\n\n{"a": '), "train.jsonl, line 3: not JSON"
    ),
    "a list in line 2": of(rows(GOOD, [1]), "line 2: needs an object, got [1]"),
    "a column of objects": of(
        write("t.json", '{"data": {"question": "q", "answer": "1"}}'),
        "columns 'data'", line=f"{TRAIN} --dataset_path t.json",
    ),
    "nested too deeply": of(
        write("train.jsonl", "[" * 100_000), "train.jsonl, line 1: not JSON", "nested too deeply"
    ),
    "a number of 5000 digits": of(
        write("train.jsonl", '{"question": "q", "answer": %s}' % ("9" * 5000)),
        "train.jsonl, line 1: not JSON", "digits",
    ),
    "not UTF-8 data": of(write("train.jsonl", b'{"question": "\xff"}\n'), "train.jsonl", "utf-8"),
    "binary data": of(write("train.jsonl", bytes(range(256))), "train.jsonl", "utf-8"),
    "not parquet": of(
        write("t.parquet", "PAR1"), "data set t.parquet", line=f"{TRAIN} --dataset_path t.parquet"
    ),
    "another suffix": of(
        write("t.csv", "a,b"), "t.csv: needs one of .jsonl, .json, .parquet",
        line=f"{TRAIN} --dataset_path t.csv",
    ),
    "unknown split": of(
        sound, "split 'nope'", "train (22 rows)", line=f"{TRAIN} --dataset_split nope"
    ),
    "no such syntax": of(
        sound, "split 'train[a:]'", "train (22 rows)", line=f"{TRAIN} --dataset_split train[a:]"
    ),
    "split out of range": of(
        sound, "dataset_split='train[500:600]' leaves no row", "train (22 rows)",
        line=f"{TRAIN} --dataset_split train[500:600]",
    ),
    "eval split out of range": of(
        sound, "eval_split='train[500:]' leaves no row", "train (8 rows)",
        line=f"{TRAIN} --eval_split train[500:]",
    ),
    "overlap": of(
        sound, "share train[5:10]", "leave --dataset_split empty",
        line=f"{TRAIN} --eval_dataset_path= --dataset_split train[:10] --eval_split train[5:20]",
    ),
    "a single row": of(
        rows(GOOD), "leaves no row of train.jsonl", "train (1 rows)", "--eval_dataset_path",
        line=f"{TRAIN} --eval_dataset_path="
    ),
    "the same rows": of(
        lambda root: shutil.copy(root / "eval.jsonl", root / "train.jsonl"),
        "no training problem is left", "also an evaluation problem: 8 rows",
    ),
    "all too long": of(
        sound, "no training problem is left", "longer than max_prompt_tokens=5",
        line=f"{TRAIN} --max_prompt_tokens 5",
    ),
    "template missing": of(remove("plain.prompt"), "prompt_template=plain.prompt: no such file"),
    "template a folder": of(folder_for("plain.prompt"), "prompt_template=plain.prompt: no such"),
    "template empty": of(write("plain.prompt", ""), "plain.prompt: must contain {problem}"),
    "template without slot": of(
        write("plain.prompt", "Solve {question}"), "must contain {problem}, where the problem goes"
    ),
    "template not UTF-8": of(write("plain.prompt", b"\xff{problem}"), "plain.prompt", "utf-8"),
}  # fmt: skip
MODELS = {
    "neither folder nor hub id": of(
        sound, "model_id='no/such/model'", "Check the spelling",
        line=f"{TRAIN} --model_id no/such/model"
    ),
    "a file": of(sound, "model_id='c.py' is a file", "folder", line=f"{TRAIN} --model_id c.py"),
    "no config.json": of(remove("base/config.json"), "model folder base has no config.json"),
    "an adapter's folder": of(
        sound, "has no config.json", "--model_id is the base model",
        line=f"{TRAIN} --model_id run/adapters/step_000002",
    ),
    "config.json cut": of(cut("base/config.json", 40), "base/config.json cannot be read"),
    "unsupported type": of(
        fields("base/config.json", model_type="gpt2"),
        "base/config.json: model_type='gpt2' is not supported; supported: qwen3",
    ),
    "unknown type": of(
        fields("base/config.json", model_type="qwen9"), "base/config.json cannot be read", "qwen9"
    ),
    "rope scaling": of(
        fields("base/config.json", rope_parameters={
            "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        "rope_type='linear' (supported: default, llama3, yarn)",
    ),
    "no tokenizer": of(
        both(remove("base/tokenizer.json"), remove("base/tokenizer_config.json")),
        "model_id=base: no tokenizer", "give a folder with tokenizer.json",
    ),
    "tokenizer cut": of(
        cut("base/tokenizer.json", 100), "model_id=base: no tokenizer", "tokenizer.json"
    ),
    "another model's tokenizer": of(
        larger_tokenizer, "model_id=base: the tokenizer has 51 tokens", "vocab_size=50"
    ),
    "broken chat template": of(
        write("base/chat_template.jinja", "{% for m in messages %}"), "chat template", "base"
    ),
    "chat template that refuses": of(
        write("base/chat_template.jinja", "{{ raise_exception('System role first') }}"),
        "chat template", "System role first",
    ),
    "chat template that leaves the problem out": of(
        write("base/chat_template.jinja", "Hello!"), "leaves the user's message out", "'Hello!'"
    ),
    "empty chat template": of(
        write("base/chat_template.jinja", ""), "leaves the user's message out", "mend or remove it"
    ),
    "end token as a word": of(
        write("base/generation_config.json", '{"eos_token_id": "</s>"}'),
        "generation_config.json: eos_token_id='</s>': needs token ids",
    ),
    "generation config a list": of(
        write("base/generation_config.json", "[1]"), "generation_config.json: needs an object"
    ),
    "no width": of(
        fields("base/config.json", hidden_size=0), "base/config.json: hidden_size=0: must be"
    ),
    "negative width": of(fields("base/config.json", hidden_size=-64), "hidden_size=-64: must be"),
    "generation config cut": of(
        write("base/generation_config.json", "{"), "model_id=base: generation_config.json"
    ),
    "weights missing": of(remove(WEIGHTS), "model folder base has no model.safetensors"),
    "a pickle alone": of(
        both(remove(WEIGHTS), write("base/pytorch_model.bin", b"\x80\x04.")),
        "model folder base has no model.safetensors", "pytorch_model.bin", "never read",
        "save_pretrained",
    ),
    "weights cut": of(cut(WEIGHTS, 5000), "model.safetensors is damaged", "download it again"),
    "weights empty": of(write(WEIGHTS, ""), "model.safetensors is damaged"),
    "weights not safetensors": of(write(WEIGHTS, b"\xff" * 999), "model.safetensors is damaged"),
    "wrong shape": of(
        tensors(WEIGHTS, lambda t: t.update({UP: t[UP].T.copy()})),
        f"{UP} has shape [64, 96], config.json makes it [96, 64]",
    ),
    "tensor missing": of(tensors(WEIGHTS, lambda t: t.pop(UP)), f"{UP} is missing"),
    "tensor unexpected": of(
        tensors(WEIGHTS, lambda t: t.update({"model.extra": t[UP]})),
        "model.extra is not a parameter",
    ),
    "tensor NaN": of(
        tensors(WEIGHTS, put(DOWN, (3, 4), np.nan)), f"{DOWN} holds NaN or infinity", "base"
    ),
    "tensor beyond float16": of(
        tensors(WEIGHTS, put(UP, (0, 0), 7e4)), f"{UP} goes beyond float16; give --dtype bfloat16",
        line=f"{TRAIN} --dtype float16",
    ),
    "tensor infinite": of(tensors(WEIGHTS, put(UP, (0, 0), np.inf)), f"{UP} holds NaN or infinity"),
    "tensor of integers": of(
        tensors(WEIGHTS, lambda t: t.update({UP: t[UP].astype(np.int8)})), "is of type I8"
    ),
    "shard missing": of(
        sharded_by('{"weight_map": {"a": "m-1-of-2.safetensors"}}'),
        "model folder base has no m-1-of-2.safetensors",
    ),
    "index leads elsewhere": of(
        sharded_by('{"weight_map": {"a": "../x.safetensors"}}'),
        "index.json is damaged", "'../x.safetensors' is not in the folder",
    ),
    "index of numbers": of(
        sharded_by('{"weight_map": {"a": 3}}'),
        "index.json is damaged",
    ),
    "index damaged": of(
        sharded_by("{"), "index.json is damaged",
        "download it again"
    ),
    "no value head": of(
        sound, "base/config.json: model_type='qwen3'; a process reward model is a 'qwen2'",
        line=f"{TRAIN} --use_prm --prm_model_id base",
    ),
    "reward model missing": of(
        sound, "prm_model_id='no/such'", line=f"{TRAIN} --use_prm --prm_model_id no/such"
    ),
    "reward model cut": of(
        cut("prm/model.safetensors", 900), "prm/model.safetensors is damaged",
        line=f"{TRAIN} --use_prm --prm_model_id prm",
    ),
    "reward model without tokenizer": of(
        remove("prm/tokenizer.json"), "model folder prm has no tokenizer.json",
        line=f"{TRAIN} --use_prm --prm_model_id prm",
    ),
}  # fmt: skip
RUNS = {
    "run folder in use": of(
        sound, "run_dir=run: must be new or empty", "--resume run", line=f"{TRAIN} --run_dir run"
    ),
    "run folder a file": of(
        sound, "run_dir=c.py", "give a folder to write to", line=f"{TRAIN} --run_dir c.py"
    ),
    "base folder a file": of(
        sound, "base_dir=c.py", "give a folder to write to", line=f"{TRAIN} --base_dir c.py"
    ),
    "not a run": of(
        sound, "base/config.json", "not written by jgrpo.train", line="train --resume base"
    ),
    "no such run": of(sound, "no: not a run folder", line="train --resume no"),
    "resume and config": of(sound, "leave --config away", line=f"{TRAIN} --resume run"),
    "resume another run": of(
        sound, "a resumed run cannot change", "lr: 0.002 -> 0.001", line=f"{RESUME} --lr 1e-3"
    ),
    "problems changed since": of(
        one_row_fewer,
        "its problems changed since", "bring back", line=RESUME,
    ),
    "weights changed since": of(
        flipped("base/model.safetensors"), "its model changed since", "bring back", line=RESUME
    ),
    "config.json of another version": of(
        lambda root: fields("run/config.json", config={"lora_rank": 1})(root),
        "run/config.json is of another version", "lora_rank", line=RESUME,
    ),
    "config.json damaged": of(cut("run/config.json", 99), "run/config.json: not JSON", line=RESUME),
    "config.json edited": of(
        lambda root: edit_config(root, lr="x"), "run/config.json", "lr='x'", line=RESUME
    ),
    "metrics damaged": of(
        write("run/metrics.jsonl", '{"step": 0}\n{"step"\n{"step": 2}\n'),
        "run/metrics.jsonl, line 2: not a metrics line", "remove it", line=RESUME,
    ),
    "metrics damaged, to plot": of(
        write("run/metrics.jsonl", '{"step": 0}\n{"step"\n{"step": 2}\n'),
        "run/metrics.jsonl, line 2: not a metrics line", line="plot run",
    ),
    "no metrics to plot": of(
        remove("run/metrics.jsonl"), "run: not a run folder: it has no metrics", line="plot run"
    ),
    "plot over a folder": of(sound, "--out run: is a folder", line="plot run --out run"),
    "plot into nowhere": of(sound, "--out no/c.png", line="plot run --out no/c.png"),
    "fewer steps than are done": of(
        sound, "n_grpo_steps=1", "has done 2 steps", line=f"{RESUME} --n_grpo_steps 1"
    ),
    "no checkpoint": of(
        remove(LAST), "holds no checkpoint to resume from", line=RESUME
    ),
    "half a checkpoint": of(
        lambda root: (root / LAST).rename(root / f"{LAST}.orbax-checkpoint-tmp"),
        "holds no checkpoint to resume from", line=RESUME,
    ),
    "checkpoint without arrays": of(
        remove(f"{LAST}/default"), "checkpoint 2", "run/checkpoints", line=RESUME
    ),
    "checkpoint of zeros": of(
        every_file(LAST, "*", b"\0" * 64), "checkpoint 2", "run/checkpoints", line=RESUME
    ),
    "checkpoint emptied": of(
        every_file(LAST, "*", b""), "checkpoint 2", "run/checkpoints", line=RESUME
    ),
    "checkpoint's data damaged": of(
        every_file(f"{LAST}/default/d", "*", b"x" * 50), "checkpoint 2", "run/checkpoints",
        line=RESUME
    ),
    "checkpoint of another rank": of(
        lambda root: edit_config(root, lora_r=2), "checkpoint 2", "does not fit this run",
        line=RESUME
    ),
    "ablation of nothing": of(
        sound, "run/rollouts/step_000001.jsonl", line="ablate rollouts run --variants rank1"
    ),
}  # fmt: skip
ADAPTERS = {
    "no adapter": of(
        sound, "no is no PEFT adapter: it has no adapter_config.json",
        line="evaluate --config c.py --adapter no",
    ),
    "a file for an adapter": of(
        sound, "c.py is no PEFT adapter", line="evaluate --config c.py --adapter c.py"
    ),
    "adapter config cut": of(cut(ADAPTER_CONFIG, 30), "is damaged", line=EVALUATE),
    "adapter config a list": of(write(ADAPTER_CONFIG, "[]"), "is damaged", line=EVALUATE),
    "rank as text": of(fields(ADAPTER_CONFIG, r="8"), "r='8'", line=EVALUATE),
    "DoRA": of(fields(ADAPTER_CONFIG, use_dora=True), "only plain LoRA", "use_dora", line=EVALUATE),
    "targets a number": of(
        fields(ADAPTER_CONFIG, target_modules=3), "target_modules=3", line=EVALUATE
    ),
    "unknown target": of(
        fields(ADAPTER_CONFIG, target_modules=["c_attn"]), "['c_attn'] are none of", line=EVALUATE
    ),
    "another rank than its config": of(
        fields(ADAPTER_CONFIG, r=4), "does not fit the model", "is [96, 1], not [96, 4]",
        line=EVALUATE,
    ),
    "adapter cut": of(cut(ADAPTER, 2000), "cannot be read as safetensors", line=EVALUATE),
    "adapter missing": of(remove(ADAPTER), "cannot be read as safetensors", line=EVALUATE),
    "adapter a pickle": of(
        both(remove(ADAPTER), write("run/adapters/step_000002/adapter_model.bin", b"\x80\x04.")),
        "adapter_model.bin is a pickle", "convert it with PEFT", line=EVALUATE,
    ),
    "adapter NaN": of(
        tensors(ADAPTER, put(Q_A, (0, 0), np.nan)), f"{Q_A} is not finite", line=EVALUATE
    ),
    "adapter without a layer": of(
        tensors(ADAPTER, lambda t: t.pop(Q_A)), f"{Q_A} is missing", line=EVALUATE
    ),
    "adapter of another shape": of(
        tensors(ADAPTER, lambda t: t.update({Q_A: t[Q_A].T.copy()})), "not [1, 64]", line=EVALUATE
    ),
    "adapter of a larger model": of(
        tensors(ADAPTER, lambda t: t.update({Q_A.replace("0", "7"): t[Q_A]})),
        "belongs to no target of this model", line=EVALUATE,
    ),
    "completions into nowhere": of(
        sound, "--out no/o.jsonl: there is no folder no",
        line="evaluate --config c.py --out no/o.jsonl"
    ),
    "completions into a folder": of(
        sound, "--out base: is a folder, or in one", line="evaluate --config c.py --out base"
    ),
}  # fmt: skip
SERVE = {
    "make the toy in a file": of(sound, "c.py", "give a folder to write to", line="tiny c.py"),
    "a key on the command line": of(
        sound,
        "--api-key: a command line is seen",
        "VLLM_API_KEY",
        line="serve --config c.py -- --api-key=sk-1",
    ),
    "serve without a port": of(
        sound, "http://HOST:PORT", line="serve --rollout vllm --vllm_url http://h:x"
    ),
    "serve at no port for a config without a server": of(
        sound, "http://HOST:PORT", line="serve --config c.py --vllm_url http://h:x"
    ),
    "serve no rank for a config without a server": of(
        sound, "vLLM admits at most 512", line="serve --config c.py --lora_r 600"
    ),
    "serve a rank too large": of(sound, "vLLM admits at most 512", line="serve --lora_r 600"),
}
PERMISSIONS = {
    "config unreadable": of(mode("c.py", 0), "c.py", "Permission denied"),
    "data unreadable": of(mode("train.jsonl", 0), "data set train.jsonl", "Permission denied"),
    "template unreadable": of(mode("plain.prompt", 0), "plain.prompt", "Permission denied"),
    "weights unreadable": of(mode(WEIGHTS, 0), "model.safetensors", "Permission denied"),
    "model config unreadable": of(
        mode("base/config.json", 0), "base/config.json cannot be read", "Permission denied"
    ),
    "base folder read-only": of(
        both(folder_for("runs"), mode("runs", 0o500)),
        "base_dir=runs", "Permission denied", "give a folder to write to",
    ),
    "run folder read-only": of(
        lambda root: [mode(name, bits)(root) for name, bits in
                      (("run/metrics.jsonl", 0o400), ("run", 0o500))],
        "run", "Permission denied", line=RESUME,
    ),
    "picture read-only": of(mode("run", 0o500), "--out run/curves.png", line="plot run"),
    "completions read-only": of(
        mode("base", 0o500), "--out base/o.jsonl", line="evaluate --config c.py --out base/o.jsonl"
    ),
}  # fmt: skip
CASES = FLAGS | FILES | DATA | MODELS | RUNS | ADAPTERS | SERVE


def edit_config(root: Path, **changes: object) -> None:
    """Change what the run folder says that the run was started with."""
    saved = json.loads((root / "run" / "config.json").read_text())["config"]
    fields("run/config.json", config=saved | changes)(root)


# -- the sound folder, and the command in it --------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A base, problems, a config, a reward model, and what two steps of a run leave; every path in
    it is relative."""
    root = tmp_path_factory.mktemp("whole")
    write_base(root / "base")
    write_prm(root / "prm")
    write_problems(root)
    (root / "configs").symlink_to(ROOT / "configs")
    config = tiny_config(Path())
    write_config_file(root / "c.py", config)
    with contextlib.chdir(root):
        run = Path("run")
        run.mkdir()
        inputs = session.fingerprints(config, session.open_problems(config))
        write_config(run, config, {"inputs": inputs})
        (run / "metrics.jsonl").write_text("".join(json_line({"step": k}) for k in range(3)))
        policy = open_policy(config)
        learner = OneLearner(config, policy.graph, policy.adapter, policy.base)
        state = jax.device_get(learner.state(0))
        checkpoints = Checkpoints(run)
        checkpoints.save(2, state)
        checkpoints.close()
        shape = adapters.AdapterConfig(1, 32, config.lora_target_modules)
        for k in range(3):
            adapters.save(policy.adapter, run / "adapters" / f"step_{k:06d}", shape, "base")
    return root


def spent(*_: object, **__: object) -> None:
    raise AssertionError("compute is spent before the input was refused")


@pytest.fixture
def place(whole, tmp_path, monkeypatch) -> Path:
    """A copy of the sound folder, to be damaged; whatever would cost more than reading raises."""
    root = tmp_path / "place"
    shutil.copytree(whole, root, symlinks=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or else the process starts itself again
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sampler, "VllmSampler", spent)
    monkeypatch.setattr(JaxSampler, "sample", spent)
    monkeypatch.setattr(learner.Learner, "learn", spent)
    monkeypatch.setattr(os, "execvpe", spent)
    return root


def contents(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@contextlib.contextmanager
def plain_user() -> Iterator[None]:
    """Permissions hold inside, for root too: this thread lets go of the capabilities that pass over
    them (capset(2): CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH), and takes them again."""
    if os.geteuid():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root, whom permissions do not hold, and not on Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: low words, then high
    libc.capget(header, sets)
    before = sets[0]
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


def refusal(line: str, capsys) -> str:
    """Run a command -> its stderr; it must end with status 2."""
    with pytest.raises(SystemExit) as end:
        as_main(*line.split())
    out, err = capsys.readouterr()
    assert end.value.code == 2, out + err
    assert 'File "' not in err.replace('File "r.py"', "")  # a traceback of ours
    assert out == ""
    return err


SOME = [*CASES][::4]  # of a bare pytest


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow]) for name in CASES],
)
def test_bad_input_is_refused_with_its_name_and_the_remedy(name, place, capsys):
    case = CASES[name]
    case.damage(place)
    before = contents(place)
    said = refusal(case.line, capsys)
    print(said)
    for words in case.says:
        assert words in said
    assert contents(place) == before


@pytest.mark.parametrize("name", PERMISSIONS)
def test_what_may_not_be_read_or_written_is_named(name, place, capsys):
    case = PERMISSIONS[name]
    before = contents(place)
    modes = {path: path.stat().st_mode for path in place.rglob("*")}
    case.damage(place)
    with plain_user():
        said = refusal(case.line, capsys)
    for words in case.says:
        assert words in said
    for path, bits in modes.items():
        path.chmod(bits)
    assert contents(place) == before | ({"runs": None} if "base folder" in name else {})
