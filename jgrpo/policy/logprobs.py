"""Log-probability of each token given the ones before it: the only place that shifts by one, and
the only one that divides by the temperature.

A prompt runs through the model once, and all its completions look back at it. The head (D -> V)
runs over chunks of the tokens that are trained, so that no [N, T, V] array ever exists; what else
reaches it only fills up the last chunk.

Axes as in `batch`: P prompts of S tokens, R rows of U tokens, M tokens that are computed of these
slots, N completions; K slots for trained tokens in the head: M or R U, and what fills up chunks.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jgrpo.policy.attention import Attend, attention, causal_mask
from jgrpo.policy.backend import backend
from jgrpo.policy.batch import MicroBatch
from jgrpo.policy.lora import own_columns
from jgrpo.policy.model import Decoder, positions_in
from jgrpo.policy.tape import Tape

BLOCKS = {"xla": (96, 8), "cudnn": (512, 2)}
"""How many tokens of a row attend at once at least, and how many such blocks a row has at most: 8
compute 0.56 of a row's scores; more would save little and take longer to compile. Around cuDNN's
calls each block is copied, and 4 cost what they save."""


def token_logprobs(
    model: Decoder,
    batch: MicroBatch,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """logprobs and entropies of a micro-batch's completions, float32 [N, U], 0 where its mask is 0.

    logprobs[n, t] = log softmax(logits / temperature)[token t], the logits being those after token
    t - 1 (for the first, after the prompt), and entropies[n, t] is that distribution's entropy in
    nats (without a gradient, unless `entropy_gradient`). The gradient is that of the hidden states;
    the head is frozen. `options` are those of `hidden_states`.
    """
    hidden, _ = hidden_states(model, batch, None, **options)
    return head_logprobs(
        model, hidden, batch, temperature=temperature, entropy_gradient=entropy_gradient
    )


def hidden_states(
    model: Decoder,
    batch: MicroBatch,
    tape: Tape | None,
    *,
    ranks: Sequence[int] = (1,),
    checkpoint: bool = False,
    attn_implementation: str = "xla",
) -> tuple[jax.Array, Tape | None]:
    """The computed tokens' final hidden states [1, M, D], and the tape, written (`taped_scan`).
    The model's adapter is several of these `ranks` side by side, or one alone."""
    (p, s), lengths = batch.prompts.shape, jnp.asarray(batch.prompt_lengths)
    ids = jnp.concatenate([batch.prompts.reshape(-1), batch.rows.reshape(-1)])
    in_rows = lengths[batch.row_prompts][:, None] + positions_in(jnp.asarray(batch.segments))
    positions = jnp.concatenate([jnp.tile(jnp.arange(s), p), in_rows.reshape(-1)])
    of_prompts = jnp.asarray(batch.members)
    of_rows = jnp.repeat(of_prompts[batch.row_prompts], batch.rows.shape[1])
    members = jnp.concatenate([jnp.repeat(of_prompts, s), of_rows])
    ids, positions, members = (
        x.at[batch.places].get(mode="fill", fill_value=0)[None] for x in (ids, positions, members)
    )
    own = own_columns(members, ranks)
    attend = _shared_prompts(batch, attn_implementation)
    return model.model(ids, positions, attend, own=own, checkpoint=checkpoint, tape=tape)


def head_logprobs(
    model: Decoder,
    hidden: jax.Array,
    batch: MicroBatch,
    *,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` of the hidden states: the tokens of the mask, packed, go to the head."""
    batch = jax.tree.map(jnp.asarray, batch)
    wanted = batch.mask.reshape(-1) > 0
    chunk, n_chunks = _chunks(min(len(batch.places), batch.rows.size), model.config.vocab_size)
    k = chunk * n_chunks
    in_head = jnp.where(wanted, jnp.cumsum(wanted) - 1, k).astype(jnp.uint32)  # [N U]: which of K
    of_mask = _inverse(in_head, k)  # [K]: which of N U
    hidden, before = _hidden_before(hidden[0], batch)
    unasked, asked = jnp.full(len(hidden), k, jnp.uint32), jnp.where(wanted, before, len(hidden))
    after = unasked.at[asked].set(in_head, mode="drop")  # [M + N]: which of K
    u = jnp.arange(batch.mask.shape[1], dtype=jnp.uint32)
    slots = (jnp.asarray(batch.starts)[:, None] + u).reshape(-1)
    before, slots = (x.at[of_mask].get(mode="fill", fill_value=0) for x in (before, slots))
    packed = _chunked(
        model, hidden, before, after, batch.rows.reshape(-1)[slots], wanted.sum(dtype=jnp.uint32),
        chunk=chunk, temperature=temperature, entropy_gradient=entropy_gradient,
    )  # fmt: skip
    logprobs, entropies = (_move(x, in_head, of_mask).reshape(batch.mask.shape) for x in packed)
    return logprobs, entropies


def _hidden_before(hidden: jax.Array, batch: MicroBatch) -> tuple[jax.Array, jax.Array]:
    """hidden [M, D] -> [M + N, D], with the last token of its prompt for each completion, and which
    of these comes before each token of the completions [N U]: each before one at most."""
    m, (p, s), (n, u) = len(hidden), batch.prompts.shape, batch.mask.shape
    tokens = _token_in_slot(batch)
    last = tokens[jnp.arange(p) * s + batch.prompt_lengths - 1]
    lasts = _move(hidden, last, _inverse(last, m))
    firsts = _repeat(lasts, batch.row_prompts[batch.starts // batch.rows.shape[1]])
    slots = p * s + batch.starts[:, None] + jnp.arange(u, dtype=jnp.uint32)
    first = m + jnp.arange(n, dtype=jnp.uint32)
    before = jnp.concatenate([first[:, None], tokens[slots[:, :-1]]], axis=1)
    return jnp.concatenate([hidden, firsts]), before.reshape(-1)


def _token_in_slot(batch: MicroBatch) -> jax.Array:
    """uint32 [P S + R U]: which of the computed tokens is in each slot, M where none is."""
    return _inverse(jnp.asarray(batch.places), batch.prompts.size + batch.rows.size)


def _in_slots(x: jax.Array, batch: MicroBatch, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [1, M, ...] of the computed tokens -> prompts [P, S, ...] and rows [R, U, ...]."""
    flat, n = _moved(x[0], tokens, jnp.asarray(batch.places)), batch.prompts.size
    parts = flat[:n], flat[n:]
    shapes = batch.prompts.shape, batch.rows.shape
    of_prompts, of_rows = (y.reshape(*k, *x.shape[2:]) for y, k in zip(parts, shapes, strict=True))
    return of_prompts, of_rows


def _from_slots(of_prompts, of_rows, batch: MicroBatch, tokens: jax.Array) -> jax.Array:
    """The way back: [P, S, ...] and [R, U, ...] -> [1, M, ...]."""
    flat = jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in (of_prompts, of_rows)])
    return _moved(flat, jnp.asarray(batch.places), tokens)[None]


def _moved(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """x[source], 0 where that is out of bounds; x[i] goes to target[i]."""
    return x if len(source) == len(x) else _move(x, source, target)  # all slots: in their places


def _inverse(places: jax.Array, n: int) -> jax.Array:
    """uint32 [n]: which of the places is i, as many as there are where none is."""
    index = jnp.arange(len(places), dtype=jnp.uint32)
    return jnp.full(n, len(places), jnp.uint32).at[places].set(index, mode="drop")


@jax.custom_vjp
def _move(x, source, target):
    return x.at[source].get(mode="fill", fill_value=0)


_move.defvjp(  # the same way back; JAX's own gradient would add up row by row
    lambda x, source, target: (_move(x, source, target), (source, target)),
    lambda moves, dy: (_move(dy, *reversed(moves)), None, None),
)


def _repeat(x: jax.Array, which: jax.Array) -> jax.Array:
    """x [P, ...] -> x[which] [R, ...]."""
    return _repeated(x, which, len(x))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _repeated(x, which, p):
    return x[which]


def _added_up(p, which, dy):
    """A product: JAX's own gradient would add in 16 bits, and on a GPU in no fixed order."""
    return jnp.tensordot((which == jnp.arange(p)[:, None]).astype(dy.dtype), dy, 1), None


_repeated.defvjp(lambda x, which, p: (x[which], which), _added_up)


def _shared_prompts(batch: MicroBatch, implementation: str) -> Attend:
    """A prompt's tokens see each other, a completion's the prompt and each other; all causally."""
    (_, s), (r, u) = batch.prompts.shape, batch.rows.shape
    among_prompts = jnp.tril(jnp.ones((1, s, s), bool))  # padding comes last, and is not seen
    in_prompt = jnp.arange(s) < jnp.asarray(batch.prompt_lengths)[batch.row_prompts][:, None]
    in_prompt = jnp.broadcast_to(in_prompt[:, None], (r, u, s))
    among_rows = jnp.concatenate([in_prompt, causal_mask(jnp.asarray(batch.segments))], axis=2)

    in_blocks = [among_rows[:, a:b, : s + b] for a, b in _blocks(u, implementation)]
    arrays = batch, _token_in_slot(batch), among_prompts, in_blocks
    return Partial(_ATTEND[implementation], *arrays)


def _blocks(u: int, implementation: str) -> list[tuple[int, int]]:
    """From where to where the U tokens of a row attend at once."""
    least, most = BLOCKS[implementation]
    n = min(max(1, u // least), most)
    return [(u * i // n, u * (i + 1) // n) for i in range(n)]


def _attend(implementation: str, batch, tokens, among_prompts, in_blocks, q, k, v, _):
    """An `Attend` of the arrays of `_shared_prompts`."""
    s, u = batch.prompts.shape[1], batch.rows.shape[1]
    (q_prompts, q_rows), (k_prompts, k_rows), (v_prompts, v_rows) = (
        _in_slots(x, batch, tokens) for x in (q, k, v)
    )
    k_rows = jnp.concatenate([_repeat(k_prompts, batch.row_prompts), k_rows], axis=1)
    v_rows = jnp.concatenate([_repeat(v_prompts, batch.row_prompts), v_rows], axis=1)
    of_prompts = attention(q_prompts, k_prompts, v_prompts, among_prompts, implementation)
    of_blocks = [  # no query sees what comes after its block
        attention(
            q_rows[:, a:b],
            k_rows[:, : s + b],
            v_rows[:, : s + b],
            seen,
            implementation,
        )
        for (a, b), seen in zip(_blocks(u, implementation), in_blocks, strict=True)
    ]
    of_rows = jnp.concatenate(of_blocks, axis=1)
    return _from_slots(of_prompts, of_rows, batch, tokens), None


# The same functions each time, so that JAX finds the trace of a layer again.
_ATTEND = {name: partial(_attend, name) for name in ("xla", "cudnn")}


def _softmax(model: Decoder, temperature: float, hidden: jax.Array, targets: jax.Array):
    """hidden [K, D], targets [K] -> logits and exp(logit - largest) [K, V], log z and the targets'
    logprobs [K]; all float32."""
    logits = model.logits(hidden) / temperature
    largest = logits.max(axis=-1)
    weights = jnp.exp(logits - largest[:, None])  # one exp for logprob, entropy and gradient
    log_z = jnp.log(weights.sum(axis=-1)) + largest
    logprobs = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - log_z
    return logits, weights, log_z, logprobs


def _head(model: Decoder, temperature: float, hidden: jax.Array, targets: jax.Array):
    """hidden [K, D], targets [K] -> the targets' logprobs, and the entropies [K]."""
    logits, weights, log_z, logprobs = _softmax(model, temperature, hidden, targets)
    return logprobs, log_z - jnp.sum(weights * logits, axis=-1) / weights.sum(axis=-1)


def _head_and_gradients(
    model: Decoder,
    temperature: float,
    entropy_gradient: bool,
    hidden: jax.Array,
    targets: jax.Array,
):
    """As `_head`, and the gradients [K, D] of the logprobs (and of the entropies) by hidden.

    With w_v the kernel's columns and p the distribution, both need m = sum_v p_v w_v and no more:
    d logprob / d hidden = (w_target - m) / temperature, and the mean logit, of which the entropy is
    made, is hidden m / temperature. That saves three passes over the logits.
    """
    logits, weights, log_z, logprobs = _softmax(model, temperature, hidden, targets)
    kernel = model.head
    rounded = weights.astype(kernel.dtype)
    z = rounded.sum(axis=-1, dtype=jnp.float32)[:, None]

    def mean(weights):
        return jnp.matmul(weights, kernel.T, preferred_element_type=jnp.float32) / z

    m = mean(rounded)
    mean_logits = jnp.einsum("kd,kd->k", hidden.astype(jnp.float32), m) / temperature
    gradients = [(kernel.T[targets] - m) / temperature]
    if entropy_gradient:  # d entropy = - sum_v p_v (logit_v - mean logit) d logit_v
        spread = (weights * (logits - mean_logits[:, None])).astype(kernel.dtype)
        gradients.append(-mean(spread) / temperature)
    return (logprobs, log_z - mean_logits), gradients


def _chunked(
    model, hidden, before, after, targets, n_wanted, *, chunk, temperature, entropy_gradient
):
    """`_head` of hidden [M, D] at before [K] and targets [K], a chunk at a time: the values [K], 0
    in the chunks that hold none of the first n_wanted. after [M] is the inverse of before.

    Where a gradient is asked for, it is computed with the value and kept [K, D], so that the
    backward pass does not come to the head again (JAX cannot go back through such a loop).
    """

    @jax.custom_vjp
    def run(*given):
        return _by_chunks(partial(_head, model, temperature), chunk, *given)

    def forward(*given):
        function = partial(_head_and_gradients, model, temperature, entropy_gradient)
        values, gradients = _by_chunks(function, chunk, *given)
        return values, (gradients, after)

    def backward(saved, cotangents):
        gradients, after = saved
        weighed = sum(g * c[:, None] for g, c in zip(gradients, cotangents, strict=False))
        total = weighed.at[after].get(mode="fill", fill_value=0)
        return total.astype(hidden.dtype), None, None, None

    run.defvjp(forward, backward)
    return run(hidden, before, targets, n_wanted)


def _by_chunks(function, chunk, hidden, before, targets, n_wanted):
    """`function` of hidden[before] and the targets, as many chunks as hold the first n_wanted."""

    @jax.jit  # traced once, for both its uses
    def compute(start):
        b, t = (jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in (before, targets))
        return function(hidden[b], t)

    def step(i, values):
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        return jax.tree.map(put, values, compute(i * chunk))

    zero = jnp.uint32(0)
    shapes = jax.eval_shape(compute, zero)
    values = jax.tree.map(lambda x: jnp.zeros((len(before), *x.shape[1:]), x.dtype), shapes)
    return jax.lax.fori_loop(zero, (n_wanted + chunk - 1) // chunk, step, values)


def _chunks(n: int, vocab_size: int) -> tuple[int, int]:
    """How many of n tokens are in a chunk, and how many chunks there are: all alike, so that the
    last one is not mostly filling where all n are trained."""
    n_chunks = -(-n // max(8, backend().head_chunk_floats // vocab_size // 8 * 8))
    return -(-n // n_chunks), n_chunks
