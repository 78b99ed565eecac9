"""A base model, problems and a config so small that a test can train on them.

The base is a bigram model in Qwen3's clothes: after the prompt it writes \\boxed{D} with D one of
5, 6, 7 and 8, and mostly stops there. One completion in five or so is right by chance, so rewards
differ within a group, advantages are not zero, and the adapter has something to learn.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from transformers import Qwen2Config, Qwen2Model, Qwen3Config, Qwen3ForCausalLM

from jgrpo.config import Config
from jgrpo.tiny.recipe import END, make_tokenizer

ANSWERS = "5678"
SUMS = [(a, b) for a in range(9) for b in range(9) if str(a + b) in ANSWERS]
N_EVAL = 8


def write_base(folder: Path) -> Path:
    """The model and its tokenizer; head_dim is 32, the smallest that vLLM's CPU attention knows."""
    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    follows = {"\n": ["\\boxed"], "\\boxed": ["{"], "{": [*ANSWERS], "}": [END]}
    follows |= {digit: ["}"] for digit in ANSWERS}
    with torch.no_grad():
        vectors = torch.linalg.qr(torch.randn(64, 64)).Q[: len(ids)]  # orthogonal, length 1
        model.model.embed_tokens.weight.copy_(vectors * 8)  # so that an adapter does not drown it
        model.lm_head.weight.normal_(std=0.05)  # so that digits differ, and one can be preferred
        for before, after in follows.items():
            for token in after:
                model.lm_head.weight[ids[token]] += (
                    vectors[ids[before]] * 0.9
                )  # after the norm: 7.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prm(folder: Path) -> Path:
    """A random process reward model in the layout of Skywork-o1-Open-PRM: a Qwen2 body, a value
    head, and the tiny tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    tensors = {f"model.{name}": x for name, x in Qwen2Model(config).state_dict().items()}
    tensors["v_head.summary.weight"] = torch.randn(1, 32) * 0.2  # scores not at 0 or 1
    tensors["v_head.summary.bias"] = torch.zeros(1)
    config.save_pretrained(folder)
    save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def write_problems(root: Path, answer: str | None = None) -> None:
    """Sums of two digits that the base could guess; `answer`, if given, is the gold of them all."""
    rows = [
        {"question": f"What is {a} + {b}?", "answer": f"#### {answer or a + b}"} for a, b in SUMS
    ]
    for name, part in (("train", rows[N_EVAL:]), ("eval", rows[:N_EVAL])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (root / "plain.prompt").write_text("{problem}\n")


def tiny_config(root: Path, **changes: Any) -> Config:
    """A config for the base and the problems in `root`, sampled in this process.

    Prompts have 18 tokens and completions 6, so that there are few shapes, and few compilations.
    """
    options: dict[str, Any] = {
        "model_id": str(root / "base"), "dtype": "float32", "rollout": "jax",
        "dataset_path": str(root / "train.jsonl"), "eval_dataset_path": str(root / "eval.jsonl"),
        "prompt_template": str(root / "plain.prompt"), "max_prompt_tokens": 18, "max_tokens": 6,
        "n_grpo_steps": 4, "n_prompts_per_step": 4, "group_size": 8, "micro_batch_size": 8,
        "gradient_checkpointing": False, "lr": 2e-3, "eval_every": 2, "n_eval_prompts": N_EVAL,
        "checkpoint_every": 2, "grader_workers": 1, "grader_timeout_s": 20.0,
        "base_dir": str(root / "runs"),
    }  # fmt: skip
    return Config(**{**options, **changes})


def write_config_file(file: Path, config: Config) -> Path:
    """The config as a file for --config."""
    file.write_text(f"from jgrpo.config import Config\n\nconfig = {config!r}\n")
    return file


def comparable(rows: list[dict]) -> list[dict]:
    """Metrics without what the clock says, and what happened to be compiled."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "train/compilations"}
        for row in rows
    ]


def curves(run: Path) -> dict[tuple[str, int], list[float]]:
    """The points that TensorBoard shows, {(tag, step): values}: it reads the event files in the
    order of their names, up to a torn record, and drops, at a START, the steps from there on.
    Texts, charts and hparams are not among them.

    A record: length (8 bytes), its checksum (4), the event, its checksum (4).
    """
    points: dict[tuple[str, int], list[float]] = {}
    for file in sorted(run.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while len(data) > 16 and len(data) >= 16 + (length := struct.unpack("<Q", data[:8])[0]):
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                points = {key: values for key, values in points.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    points.setdefault((value.tag, event.step), []).append(value.simple_value)
    return points


def on_cards(rows: list[dict]) -> dict[tuple[str, int], list[float]]:
    """The points of metrics.jsonl that TensorBoard should show: tags of which two values differ, or
    that have only one."""
    by_tag: dict[str, dict[int, float]] = {}
    for row in rows:
        for tag, value in row.items():
            if tag != "step" and value is not None:
                by_tag.setdefault(tag, {})[row["step"]] = value
    return {
        (tag, step): [float(np.float32(value))]
        for tag, points in by_tag.items()
        if len(points) == 1 or len({*points.values()}) > 1
        for step, value in points.items()
    }


def arrays_of(adapter: Path) -> dict[str, np.ndarray]:
    return load_file(adapter / "adapter_model.safetensors")


def final_adapter(run: Path) -> dict[str, np.ndarray]:
    """The arrays of the run's last adapter."""
    return arrays_of(sorted((run / "adapters").glob("step_*"))[-1])


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def peft_logprobs(base: Path, adapter: Path, rows: list[dict], temperature: float) -> list[float]:
    """Logprobs of rollout rows' tokens by transformers and PEFT, one after another: in one pass,
    filled up on the right, where no token sees it."""
    from peft import PeftModel

    model: Any = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    texts = [torch.tensor(row["prompt_ids"] + row["token_ids"]) for row in rows]
    with torch.no_grad():
        logits = model(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)).logits
    values = []
    for row, table in zip(rows, torch.log_softmax(logits / temperature, dim=-1), strict=True):
        start, ids = len(row["prompt_ids"]) - 1, torch.tensor(row["token_ids"])
        values += table[start + torch.arange(len(ids)), ids].tolist()
    return values


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
