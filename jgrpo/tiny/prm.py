"""The quick start's process reward model, from nothing: `python -m jgrpo.tiny.prm FOLDER`.

A Qwen2 of 0.3 million parameters with a value head learns to tell right steps from wrong ones in
solutions of tiny.py's problems: careful ones, careful ones with a slip, and bare answers, hasty or
not. A line of columns is right if it is the careful one; a box is right if it holds the answer.
No problem of the evaluation set is ever trained on, and the figures printed are of those.

A verdict a step says too little where. So in training every token of a step has one (are all up to
here right?), and a second loss, next to the verdicts', asks for the token that is right next; its
head is the embedding, which the saved model keeps, so nothing of it is left over.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from rich.progress import track
from transformers import Qwen2Config

from jgrpo.cli import tune_allocator
from jgrpo.errors import stop_at_once
from jgrpo.policy.attention import full_attention
from jgrpo.policy.model import ModelConfig, positions_in
from jgrpo.policy.weights import save_model
from jgrpo.rewards.prm import ProcessRewardModel, ProcessRewards, encode, steps
from jgrpo.tiny import recipe as tiny

BARE_SHARE = 0.4
"""Solutions that are nothing but a box."""
ROW_TOKENS = 128
N_CHECKS = 5
"""Solutions of each held-out problem that the printed step accuracy is measured on."""


# -- solutions and labels ---------------------------------------------------------------------


def columns(kind: str, a: int, b: int) -> str:
    """The careful line of columns: `7+5+0=12, 7+3+1=11, 2+5+1=8.`"""
    return tiny.careful(kind, a, b).strip()


def box(n: int) -> str:
    return f"\\boxed{{{n}}}"


def labels(kind: str, a: int, b: int, completion: str) -> list[bool]:
    """For each step of a completion, whether what it states is right."""
    right = (columns(kind, a, b), box(tiny.answer(kind, a, b)))
    return [step in right for step in steps(completion)]


def read_off(line: str) -> int:
    """The number that a line of columns gives: each sum's last digit, and all of the last sum."""
    *sums, last = [int(n) for n in re.findall(r"=(\d+)", line)]
    return sum(n % 10 * 10**i for i, n in enumerate(sums)) + last * 10 ** len(sums)


def wrong_digit(text: str, rng: random.Random) -> str:
    """The text with another digit in one place."""
    at = rng.choice([m.start() for m in re.finditer(r"\d", text)])
    return text[:at] + rng.choice([d for d in "0123456789" if d != text[at]]) + text[at + 1 :]


def slip(line: str, rng: random.Random) -> str:
    """The line with a carry or borrow forgotten, if there is one, or with a wrong digit."""
    carries = list(re.finditer(r"([+-])1=(\d+)", line))
    if not carries or rng.random() < 0.5:
        return wrong_digit(line, rng)
    m = rng.choice(carries)
    total = int(m[2]) + (1 if m[1] == "-" else -1)
    return f"{line[: m.start()]}{m[1]}0={total}{line[m.end() :]}"


def solution(kind: str, a: int, b: int, rng: random.Random) -> list[str]:
    """Steps: a hasty box alone, or a line of columns and a box; about half of the latter two are
    right, and so is the former where there is nothing to carry."""
    right, hasty = tiny.answer(kind, a, b), tiny.hasty(kind, a, b)
    if rng.random() < BARE_SHARE:
        return [box(hasty)]
    line = columns(kind, a, b)
    if rng.random() < 0.5:
        line = slip(line, rng)
    guesses = [read_off(line), right, hasty, int(wrong_digit(str(right), rng))]
    return [line, box(rng.choices(guesses, (6, 1, 1, 2))[0])]


def second_thoughts(kind: str, a: int, b: int, rng: random.Random) -> list[str]:
    """Three more boxes to follow a careful solution in training: from one box in 60 tokens alone,
    to compare boxes with lines is learned too slowly."""
    right = tiny.answer(kind, a, b)
    guesses = (right, tiny.hasty(kind, a, b), int(wrong_digit(str(right), rng)))
    return [box(n) for n in rng.choices(guesses, (4, 2, 4), k=3)]


# -- training ---------------------------------------------------------------------------------


def marked(step: list[int], right: list[int]) -> np.ndarray:
    """int32 [3, tokens] of a step, given the ids of the right one: its ids; 2 as long as all ids
    are right and 1 from the first wrong one on; the id that is right next, 0 where there is none.
    """
    longer = [*right, *[-1] * len(step)]
    right_so_far = np.cumprod(np.array(step) == longer[: len(step)])
    following = np.array([*right[1:], *[0] * len(step)][: len(step)])
    return np.stack([step, 1 + right_so_far, following * right_so_far]).astype(np.int32)


def corpus(tokenizer, held_out: dict, rng: random.Random) -> Iterator[np.ndarray]:
    """Endless rows, int32 [4, ROW_TOKENS], of packed solutions: segments, then as in `marked` (the
    problems' own tokens have no marks)."""
    row, used, segment = np.zeros((4, ROW_TOKENS), np.int32), 0, 0
    while True:
        text, kind, a, b = tiny.problem(rng)
        if tiny.identity(kind, a, b) in held_out:
            continue
        claims, right_box = solution(kind, a, b, rng), box(tiny.answer(kind, a, b))
        right = [right_box]
        if len(claims) == 2:
            claims += second_thoughts(kind, a, b, rng)
            right = [columns(kind, a, b), *[right_box] * 4]
        problem, *steps_ids = _cut(tokenizer, text, claims)
        no_marks = np.stack([problem, [0] * len(problem), [0] * len(problem)])
        parts = [no_marks, *map(marked, steps_ids, _cut(tokenizer, text, right)[1:])]
        size = sum(part.shape[1] for part in parts)
        if used + size > ROW_TOKENS:
            yield row
            row, used, segment = np.zeros_like(row), 0, 0
        segment += 1
        row[0, used : used + size] = segment
        row[1:, used : used + size] = np.concatenate(parts, axis=1)
        used += size


def _cut(tokenizer, text: str, claims: list[str]) -> list[list[int]]:
    """Ids of the problem, and of each step with its newline."""
    ids, ends = encode(tokenizer, text, "\n".join(claims))
    starts = [len(encode(tokenizer, text, "")[0]), *(end + 1 for end in ends)]
    return [ids[: starts[0]], *(ids[i:j] for i, j in pairwise(starts))]


def losses(model: ProcessRewardModel, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rows [N, 4, T] -> mean cross-entropy of the verdicts, and of the tokens that are right next,
    in nats."""
    segments, ids, verdicts, following = (rows[:, i] for i in range(4))
    hidden, _ = model.model(ids, positions_in(segments), full_attention(segments))
    verdict_losses = optax.sigmoid_binary_cross_entropy(
        model.v_head.summary(hidden)[..., 0], verdicts == 2
    )
    token_losses = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ model.model.embed_tokens.embedding[...].T, following
    )
    return (
        jnp.mean(verdict_losses, where=verdicts > 0),
        jnp.mean(token_losses, where=following > 0),
    )


def train(config: ModelConfig, rows: Iterator[np.ndarray], args: "Args") -> ProcessRewardModel:
    """Both losses, all parameters; Muon for the layers' kernels, which here needs half of Adam's
    steps (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), Adam for the rest."""
    graph, params = nnx.split(ProcessRewardModel(config, rngs=nnx.Rngs(args.seed)))
    rates = [optax.warmup_cosine_decay_schedule(0, lr, args.steps // 20, args.steps)
             for lr in (args.lr, args.adam_lr)]  # fmt: skip
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            rates[0], adam_learning_rate=rates[1], adam_b2=0.98,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda x: MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params
            ),
        ),
    )  # fmt: skip

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        def loss(params):
            parts = losses(nnx.merge(graph, params), batch)
            return sum(parts), parts

        gradient, parts = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, parts

    opt_state = optimizer.init(params)
    for i in track(range(args.steps), "training"):
        batch = np.stack(list(islice(rows, args.batch_size)))
        params, opt_state, parts = step(params, opt_state, batch)
        if i % 100 == 99 or i == args.steps - 1:
            print(f"step {i + 1}  verdicts {parts[0]:.4f}  tokens {parts[1]:.4f}")
    return nnx.merge(graph, params)


# -- held-out figures -------------------------------------------------------------------------


def held_out_problems(held_out: dict) -> list[tuple[str, str, int, int]]:
    """Text, kind, a and b of each row of tiny.problem_sets."""
    texts = [(row["question"], row["kind"]) for row in held_out.values()]
    return [(text, kind, *map(int, re.findall(r"\d+", text))) for text, kind in texts]


def step_accuracy(rewards: ProcessRewards, held_out: dict, rng: random.Random) -> dict[str, float]:
    """Share of the steps of random solutions to held-out problems whose score is on the right side
    of 0.5: of all, of lines of columns, of boxes after a line, and of bare boxes."""
    problems = held_out_problems(held_out) * N_CHECKS
    solutions = [solution(*p[1:], rng) for p in problems]
    completions = ["\n".join(s) for s in solutions]
    scores = rewards.step_scores([(p[0], c) for p, c in zip(problems, completions, strict=True)])
    hits: dict[str, list[bool]] = {"all": [], "line": [], "box": [], "bare": []}
    for p, completion, row in zip(problems, completions, scores, strict=True):
        right = [(x > 0.5) == y for x, y in zip(row, labels(*p[1:], completion), strict=True)]
        hits["all"] += right
        for kind, hit in zip(["line", "box"] if len(right) == 2 else ["bare"], right, strict=True):
            hits[kind].append(hit)
    return {kind: float(np.mean(hit)) for kind, hit in hits.items()}


def care_and_haste(rewards: ProcessRewards, held_out: dict) -> np.ndarray:
    """float32 [P, 2]: rewards of the right careful solution and of the hasty one, for the held-out
    problems on which haste is wrong."""
    problems = [p for p in held_out_problems(held_out) if tiny.hasty(*p[1:]) != tiny.answer(*p[1:])]
    solutions = [[tiny.solution(*p[1:], haste=haste) for haste in (False, True)] for p in problems]
    return rewards([p[0] for p in problems], solutions)


@dataclass
class Args:
    """Build the process reward model of the quick start's problems in a folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    steps: int = 5000
    """Training steps."""
    batch_size: int = 24
    """Rows a step, about two solutions each."""
    lr: float = 0.03
    """Highest learning rate of the layers' kernels (Muon)."""
    adam_lr: float = 2e-3
    """Highest learning rate of all other parameters (Adam)."""
    seed: int = 0
    """Seeds the weights, the corpus, and the problem sets: must be the one given to jgrpo.tiny."""


def main() -> None:
    args = tyro.cli(Args, prog="python -m jgrpo.tiny.prm")
    tokenizer = tiny.make_tokenizer()
    hf = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, architectures=["Qwen2ForPrmModel"],
    )  # fmt: skip
    _, held_out = tiny.problem_sets(tiny.N_TRAIN, tiny.N_EVAL, args.seed)
    rows = corpus(tokenizer, held_out, random.Random(args.seed + 1))
    model = train(ModelConfig.from_hf(hf), rows, args)
    args.folder.mkdir(parents=True, exist_ok=True)
    save_model(model, args.folder, hf, "bfloat16")
    tokenizer.save_pretrained(args.folder)
    report(args.folder, held_out)


def report(folder: Path, held_out: dict) -> None:
    """Print the figures of the saved model."""
    rewards = ProcessRewards(folder, dtype="float32", batch_size=64)
    for kind, share in step_accuracy(rewards, held_out, random.Random(0)).items():
        print(f"held-out step accuracy  {kind:5s} {share:.3f}")
    care, haste = care_and_haste(rewards, held_out).T
    print(f"held-out problems where haste is wrong: {len(care)}; mean reward careful and right "
          f"{care.mean():.3f}, hasty {haste.mean():.3f}; careful is above hasty in "
          f"{np.mean(care > haste):.3f}")  # fmt: skip


if __name__ == "__main__":
    stop_at_once()
    tune_allocator()
    main()
