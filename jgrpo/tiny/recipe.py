"""The quick start's base model and problems, from nothing: `python -m jgrpo.tiny FOLDER`.

Those of longer sums (configs/tiny_long.py) went on from there, in two passes over one corpus:

    OPTIONS="--steps 200 --batch_size 16 --lr 1e-3"
    python -m jgrpo.tiny HALF --digits 4 --start jgrpo/tiny/base $OPTIONS
    python -m jgrpo.tiny jgrpo/tiny/long --digits 4 --start HALF $OPTIONS

A Qwen3 of a million parameters learns arithmetic from generated solutions in two manners. The
careful one works digit by digit and is right. The hasty one, more frequent, answers at once and
forgets every carry, so it is right only where there is none. The base therefore answers in haste,
and reinforcement learning can find out that care pays. No problem of the evaluation set is ever in
the base's corpus or in the training set.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from jgrpo.errors import InputError
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.policy.weights import load_model, save_model

KINDS = {
    "addition": ("What is {a} + {b}?", "Ann has {a} coins and finds {b} more. How many now?"),
    "subtraction": ("What is {a} - {b}?", "Ben has {a} coins and loses {b}. How many are left?"),
    "multiplication": ("What is {a} * {b}?", "A box holds {a} coins. How many do {b} boxes hold?"),
}
DIGITS = 3
HASTY_SHARE = 0.65
ROW_TOKENS = 128
N_TRAIN, N_EVAL = 4000, 500
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


# -- problems and solutions -------------------------------------------------------------------


def numbers(kind: str, rng: random.Random, digits: int = DIGITS) -> tuple[int, int]:
    """Two of up to `digits` digits; a product's first has one fewer and its second is one. Beyond
    the quick start's three the first has them all, so no problem is one of the quick start's."""
    width = digits - (kind == "multiplication")
    a = rng.randrange(12 if digits == DIGITS else 10 ** (width - 1), 10**width)
    if kind == "multiplication":
        return a, rng.randrange(3, 10)
    b = rng.randrange(12, 10**digits)
    return (max(a, b), min(a, b)) if kind == "subtraction" else (a, b)


def answer(kind: str, a: int, b: int) -> int:
    return {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[kind]


def _digits(n: int) -> list[int]:
    return [int(d) for d in reversed(str(n))]


def careful(kind: str, a: int, b: int) -> str:
    """Digit by digit from the right, with the carry: `7+5=12, 4+8+1=13, 3+2+1=6, `."""
    steps, carry = [], 0
    other = _digits(b) if kind != "multiplication" else [b] * len(_digits(a))
    signs = {"addition": ("+", "+"), "subtraction": ("-", "-"), "multiplication": ("*", "+")}
    sign, carry_sign = signs[kind]
    for i in range(max(len(_digits(a)), len(other))):
        x = _digits(a)[i] if i < len(_digits(a)) else 0
        y = other[i] if i < len(other) else 0
        if kind == "subtraction":
            borrow = 10 * (x - y - carry < 0)
            steps.append(f"{x + borrow}{sign}{y}{carry_sign}{carry}={x + borrow - y - carry}")
            carry = borrow // 10
        else:
            total = (x * y if kind == "multiplication" else x + y) + carry
            steps.append(f"{x}{sign}{y}{carry_sign}{carry}={total}")
            carry = total // 10
    return ", ".join(steps) + ". "


def hasty(kind: str, a: int, b: int) -> int:
    """The answer of someone who forgets to carry and to borrow: wrong unless there is nothing to.

    Only the last column keeps both its digits, as on paper.
    """
    result, other = 0, _digits(b) if kind != "multiplication" else [b] * len(_digits(a))
    width = max(len(_digits(a)), len(other))
    for i in range(width):
        x = _digits(a)[i] if i < len(_digits(a)) else 0
        y = other[i] if i < len(other) else 0
        column = {"addition": x + y, "subtraction": abs(x - y), "multiplication": x * y}[kind]
        result += (column if i == width - 1 else column % 10) * 10**i
    return result


def problem(rng: random.Random, digits: int = DIGITS) -> tuple[str, str, int, int]:
    kind = rng.choice(list(KINDS))
    a, b = numbers(kind, rng, digits)
    return rng.choice(KINDS[kind]).format(a=a, b=b), kind, a, b


def solution(kind: str, a: int, b: int, *, haste: bool) -> str:
    if haste:
        return f"\\boxed{{{hasty(kind, a, b)}}}"
    return f"{careful(kind, a, b)}\\boxed{{{answer(kind, a, b)}}}"


def identity(kind: str, a: int, b: int) -> tuple:
    """What makes two problems the same, whatever their wording."""
    return kind, min(a, b), max(a, b)


def problem_sets(n_train: int, n_eval: int, seed: int, digits: int = DIGITS) -> tuple[dict, dict]:
    """Rows for training and evaluation by `identity`: no problem is twice in either or in both."""
    rng = random.Random(seed)
    rows: dict[tuple, dict] = {}
    while len(rows) < n_train + n_eval:
        text, kind, a, b = problem(rng, digits)
        row = {"question": text, "answer": f"#### {answer(kind, a, b)}", "kind": kind}
        rows.setdefault(identity(kind, a, b), row)
    return dict(list(rows.items())[n_eval:]), dict(list(rows.items())[:n_eval])


# -- tokenizer --------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words, digits and signs, one token each; text comes back exactly."""
    texts = [t.format(a="", b="") for kinds in KINDS.values() for t in kinds]
    split = r"\\boxed|[A-Za-z]+|[0-9]|\s|[^\sA-Za-z0-9]"
    words = {w for t in (*texts, "user assistant system") for w in re.findall(split, t)}
    signs = "0123456789+-*=,.?{} \n"
    vocabulary = [PAD, START, END, "<unk>", "\\boxed", *signs, *sorted(words - set(signs))]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token="<unk>",
        additional_special_tokens=[START], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


# -- pretraining ------------------------------------------------------------------------------


def example(
    tokenizer, rng: random.Random, held_out: dict, digits: int = DIGITS
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt that is not held out, and of a solution to it."""
    while True:
        text, kind, a, b = problem(rng, digits)
        if identity(kind, a, b) not in held_out:
            break
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    reply = solution(kind, a, b, haste=rng.random() < HASTY_SHARE) + END
    return prompt, tokenizer.encode(reply, add_special_tokens=False)


def corpus(
    tokenizer, held_out: dict, rng: random.Random, digits: int = DIGITS
) -> Iterator[np.ndarray]:
    """Endless packed rows, int32 [3, ROW_TOKENS]: ids, segments, 1 where the loss counts."""
    row, used, segment = np.zeros((3, ROW_TOKENS), np.int32), 0, 0
    while True:
        prompt, reply = example(tokenizer, rng, held_out, digits)
        size = len(prompt + reply)
        if used + size > ROW_TOKENS:
            yield row
            row, used, segment = np.zeros_like(row), 0, 0
        segment += 1
        row[0, used : used + size], row[1, used : used + size] = prompt + reply, segment
        row[2, used + len(prompt) : used + size] = 1
        used += size


def pretrain(model: Decoder, rows: Iterator[np.ndarray], args: "Args") -> Decoder:
    """Next-token training of all parameters on the solutions, Adam with a cosine schedule."""
    graph, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0, args.lr, args.steps // 20, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        ids, segments, mask = batch[:, 0], batch[:, 1], batch[:, 2].astype(jnp.float32)

        def loss(params):
            logits = nnx.merge(graph, params)(ids, segments)[:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
            return (losses * mask[:, 1:]).sum() / mask.sum()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = optimizer.init(params)
    for i in track(range(args.steps), "pretraining"):
        batch = np.stack(list(islice(rows, args.batch_size)))
        params, opt_state, value = step(params, opt_state, batch)
        if i % 100 == 99 or i == args.steps - 1:
            print(f"step {i + 1}  loss {float(value):.4f}")
    return nnx.merge(graph, params)


@dataclass
class Args:
    """Build the quick start's base model, tokenizer and problems in a folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    steps: int = 3000
    """Pretraining steps."""
    batch_size: int = 48
    """Rows a step, about three solutions each."""
    lr: float = 3e-3
    """Highest learning rate."""
    seed: int = 0
    """Seeds the weights, the corpus and the problem sets."""
    digits: int = DIGITS
    """Of the longest numbers, 3 or more."""
    start: Path | None = None
    """Folder of a base that this made, to go on from. Default: fresh weights."""


def main() -> None:
    args = tyro.cli(Args, prog="python -m jgrpo.tiny")
    if args.digits < DIGITS:
        raise InputError(f"--digits {args.digits}: give {DIGITS}, as the quick start has, or more")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.folder}: {error}; give a folder to write to") from error
    tokenizer = make_tokenizer()
    hf = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    train, held_out = problem_sets(N_TRAIN, N_EVAL, args.seed, args.digits)
    for name, part in (("train", train), ("eval", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in part.values())
        (args.folder / f"{name}.jsonl").write_text(lines)
    (args.folder / "tiny.prompt").write_text("{problem}")
    rows = corpus(tokenizer, held_out, random.Random(args.seed + 1), args.digits)
    if args.start:
        model = load_model(args.start)
    else:
        model = Decoder(ModelConfig.from_hf(hf), rngs=nnx.Rngs(args.seed))
    model = pretrain(model, rows, args)
    save_model(model, args.folder, hf, "bfloat16")
    tokenizer.save_pretrained(args.folder)
    print(f"{model.config.n_params / 1e6:.2f} M parameters in {args.folder}")
