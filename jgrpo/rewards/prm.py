"""The process reward model: how likely is each step of a completion right?

The layout is Skywork-o1-Open-PRM's: a Qwen2 decoder without its head, and a value head
`v_head.summary` [1, D] whose sigmoid at the last token of a step is that step's score
(https://github.com/SkyworkAI/skywork-o1-prm-inference). Text comes in as it does there: the
problem, a newline, then each step encoded by itself and ended by the newline's token, where it is
scored. Left out on purpose: training (tiny_prm.py makes a small one), and other layouts.

    rewards = ProcessRewards(folder, dtype="bfloat16", batch_size=16)
    rewards(problems, completions)     # [P], [P][G] -> float32 [P, G], 0..1
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jgrpo.errors import InputError
from jgrpo.policy.attention import full_attention
from jgrpo.policy.batch import bucket
from jgrpo.policy.model import Body, ModelConfig, Parts, positions_in
from jgrpo.policy.tracing import traced
from jgrpo.policy.weights import filled, model_config, read_hf_config
from jgrpo.prompts.tokenizer import needed_beyond

logger = logging.getLogger("jgrpo")


# -- text -------------------------------------------------------------------------------------


def steps(text: str) -> list[str]:
    """The lines of a completion that are not blank, where the end of a sentence ends a line too.

    A sentence ends at a `.`, `!` or `?` with blanks after it: 3.14 is not cut, but "e.g. 3" is.
    """
    lines = re.sub(r"(?<=[.!?])[^\S\n]+", "\n", text).split("\n")
    return [line for line in lines if line.strip()]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    problem: str,
    completion: str,
    vocab_size: float = math.inf,
) -> tuple[list[int], list[int]]:
    """What the model reads, and the index of each step's last token (its newline) in it.

    Steps are encoded one by one, so that a newline never melts into the token before it. A token
    beyond the vocabulary (a [PAD] that somebody wrote out) is left out: the model has none for it.
    """

    def read(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [i for i in ids if i < vocab_size]

    ids, newline = read((tokenizer.bos_token or "") + problem + "\n"), read("\n")[-1]
    ends = []
    for step in steps(completion):
        ids += [*read(step), newline]
        ends.append(len(ids) - 1)
    return ids, ends


# -- model ------------------------------------------------------------------------------------


class ValueHead(nnx.Module):
    """One number a token; float32, whatever the decoder is."""

    def __init__(self, parts: Parts):
        parts = replace(parts, dtype=jnp.float32)
        self.summary = parts.dense("summary", parts.config.width, 1, use_bias=True)


class ProcessRewardModel(nnx.Module):
    """The decoder's body and a value head, named as in the checkpoint."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        parts = Parts(config, dtype, rank=0, alpha=0, target_modules=(), rngs=rngs)
        self.model = Body(parts)
        self.v_head = ValueHead(parts)

    def __call__(self, ids: jax.Array, segments: jax.Array) -> jax.Array:
        """ids, segments int32 [N, T] -> float32 [N, T]: the logit that what ends here is right."""
        hidden, _ = self.model(ids, positions_in(segments), full_attention(segments))
        return self.v_head.summary(hidden.astype(jnp.float32))[..., 0]


def load_reward_model(folder: Path, dtype: str) -> ProcessRewardModel:
    """The model of a folder, decoder in `dtype`. InputError for all that does not fit, as in
    weights.py; an lm_head that was left in the folder is not read."""
    hf = read_hf_config(folder)
    if hf.model_type != "qwen2":
        raise InputError(
            f"{folder}/config.json: model_type={hf.model_type!r}; a process reward model is a "
            "'qwen2' with a v_head, as Skywork-o1-Open-PRM is"
        )
    config = model_config(folder)
    model = nnx.eval_shape(lambda: ProcessRewardModel(config, rngs=nnx.Rngs(0), dtype=dtype))
    return filled(folder, model, unused={"lm_head.weight"})


def load_reward_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer.json as it stands. InputError if there is none that fits.

    AutoTokenizer would make Qwen2's own kind of any tokenizer that lies beside a Qwen2 config.json
    (transformers 5.19), and an empty one of none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"model folder {folder} has no tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {error!r}") from error
    vocab_size = read_hf_config(folder).vocab_size
    if needed := needed_beyond(tokenizer, vocab_size):
        raise InputError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, config.json makes it "
            f"vocab_size={vocab_size}, and {needed[0]!r} is beyond; put the model's own tokenizer "
            "there"
        )
    return tokenizer


# -- rewards ----------------------------------------------------------------------------------


class ProcessRewards:
    """Scores completions with the model of a folder, in batches of exactly `batch_size` rows.

    InputError says all that is wrong with the folder.
    """

    def __init__(self, folder: Path, *, dtype: str, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be positive")
        self.batch_size = batch_size
        hf = read_hf_config(folder)
        self.max_positions, self.vocab_size = hf.max_position_embeddings, hf.vocab_size
        self.tokenizer, model = _all_or_one_error(
            partial(load_reward_tokenizer, folder), partial(load_reward_model, folder, dtype)
        )
        self._warned = False
        graph, self._weights = nnx.split(model)
        self._scores = jax.jit(partial(_scores, graph))

    def __call__(self, problems: Sequence[str], completions: Sequence[Sequence[str]]) -> np.ndarray:
        """[P], [P][G] -> float32 [P, G]: each completion's mean step score, 0 without steps.

        ValueError if the completions are ragged or not as many groups as problems.
        """
        group_sizes = {len(group) for group in completions}
        if len(completions) != len(problems) or len(group_sizes) != 1:
            raise ValueError(
                f"{len(completions)} groups of {sorted(group_sizes)} completions for "
                f"{len(problems)} problems: needs [P][G] completions and [P] problems"
            )
        pairs = [
            (problem, completion)
            for problem, group in zip(problems, completions, strict=True)
            for completion in group
        ]
        different = list(dict.fromkeys(pairs))
        means = [s.mean() if len(s) else 0.0 for s in self.step_scores(different)]
        mean_of = dict(zip(different, means, strict=True))
        return np.array([mean_of[p] for p in pairs], np.float32).reshape(len(problems), -1)

    def step_scores(self, pairs: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        """Problem and completion pairs -> float32 [steps] each: every step's score in 0..1."""
        rows = [encode(self.tokenizer, *pair, self.vocab_size) for pair in pairs]
        scores = [np.zeros(0, np.float32)] * len(rows)
        order = [i for i in range(len(rows)) if rows[i][1]]
        order.sort(key=lambda i: -len(rows[i][0]))  # longest first: a lack of memory shows early
        if order:
            self._warn_if_too_long(len(rows[order[0]][0]))
        for start in range(0, len(order), self.batch_size):
            taken = order[start : start + self.batch_size]
            ids, segments = np.zeros((2, self.batch_size, bucket(len(rows[taken[0]][0]))), np.int32)
            for b, i in enumerate(taken):
                tokens, _ = rows[i]
                ids[b, : len(tokens)], segments[b, : len(tokens)] = tokens, 1
            batch = np.asarray(self._scores(self._weights, ids, segments))
            for b, i in enumerate(taken):
                scores[i] = batch[b, rows[i][1]]
        return scores

    def _warn_if_too_long(self, longest_tokens: int) -> None:
        if longest_tokens > self.max_positions and not self._warned:
            self._warned = True
            logger.warning(
                "the process reward model reads %d tokens, its max_position_embeddings is %d: "
                "scores of what lies beyond are not to be trusted", longest_tokens,
                self.max_positions,
            )  # fmt: skip


def _scores(graph: nnx.GraphDef, weights: nnx.State, ids: jax.Array, segments: jax.Array):
    traced("process rewards", "rows {} x {}".format(*ids.shape))
    return jax.nn.sigmoid(nnx.merge(graph, weights)(ids, segments))


def _all_or_one_error(*loaders: Callable) -> list:
    loaded, problems = [], []
    for load in loaders:
        try:
            loaded.append(load())
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return loaded
