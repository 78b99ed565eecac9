"""Every loss with every option: against PyTorch (an implementation that shares nothing with ours)
and finite differences; what must not matter (junk, padding, micro-batches); and the limits in which
two losses must agree.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jgrpo.losses import LOSSES
from jgrpo.update.step import loss_denominator


class Case(NamedTuple):
    """A loss, its options, and whether its KL is to the base model."""

    name: str
    options: dict[str, Any]
    to_base: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.options}{' to base' * self.to_base}"


def marked(cases: list[Case]) -> list:
    """Those whose options stand in another case as well, among other options, are the long ones."""
    return [pytest.param(c, marks=[pytest.mark.slow] if is_part(c) else []) for c in cases]


def is_part(case: Case) -> bool:
    return any(
        (case.name, case.to_base) == (other.name, other.to_base)
        and case.options.items() < other.options.items()
        for other in CASES
    )


HIGHER = {"clip_eps": 0.1, "clip_eps_high": 0.15}
WEIGHTS_CAP = 1.1
WEIGHTS = {"importance_cap": WEIGHTS_CAP}
CASES = [
    Case("grpo", {}),
    Case("grpo", {"clip_eps": 0.2}),
    Case("grpo", {"token_level": True}),
    Case("grpo", {"clip_eps": 0.2, "beta": 0.3, "token_level": True}),
    *(Case("grpo", {"beta": 0.3, "kl_estimator": k}) for k in ("k1", "k2", "k3")),
    *(Case("grpo", {"beta": 0.3, "kl_estimator": k}, to_base=True) for k in ("k1", "k2", "k3")),
    Case("grpo", HIGHER | WEIGHTS | {"entropy_coef": 0.1}),
    Case("dr_grpo", {"max_tokens": 7}),
    Case("dr_grpo", {"max_tokens": 7, "entropy_coef": 0.1} | HIGHER),
    Case("dr_grpo", {"max_tokens": 7, "beta": 0.3} | WEIGHTS, to_base=True),
    Case("gspo", {}),
    Case("gspo", {"beta": 0.3, "kl_estimator": "k2"} | HIGHER, to_base=True),
    Case("gspo", {"token_level": True, "entropy_coef": 0.1} | HIGHER | WEIGHTS),
    Case("rloo", {}),
    Case("rloo", {"beta": 0.3, "entropy_coef": 0.1} | HIGHER | WEIGHTS),
    Case("cispo", {"max_ratio": 1.2}),
    Case("cispo", {"max_ratio": 1.2, "beta": 0.3}),
    Case("cispo", {"max_ratio": 1.2, "beta": 0.3, "entropy_coef": 0.1} | WEIGHTS, to_base=True),
    Case("grpo", HIGHER | {"clip_delta": 1.2}),
    Case("rloo", HIGHER | {"clip_delta": 1.2}),
    Case("grpo", {"beta": 0.3, "kl_weighted": True}, to_base=True),
    Case("gspo", WEIGHTS | {"importance_mode": "sequence_mask"}),
    Case("grpo", WEIGHTS | {"importance_mode": "sequence_truncate"}),
    Case("grpo", WEIGHTS | {"importance_mode": "token_mask"}),
    Case("sapo", {}),
    Case("sapo", {"tau_positive": 0.7, "tau_negative": 3.0, "token_level": True}),
    Case("dppo", {"max_difference": 0.03}),
    Case("dppo", {"max_difference": 0.03, "token_level": True, "beta": 0.3} | WEIGHTS),
]
each_case = pytest.mark.parametrize("case", marked(CASES), ids=str)

ADVANTAGES = np.array([1.3, -0.8, 0.6, -1.1, 0.9])
MASK = np.array(
    [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0] * 5], float
)


def made_up() -> dict[str, np.ndarray]:
    """Arrays of a loss, float64: five completions of 3, 1, 4, 2 and no tokens."""
    rng = np.random.default_rng(9)
    old, ref, sampler = rng.normal(-2, 0.2, (3, 5, 5))
    drift = np.array([[0.3], [-0.3], [-0.05], [0.2], [0.0]])
    logprobs = old + drift + rng.uniform(-0.2, 0.2, old.shape)
    return {"logprobs": logprobs, "old": old, "advantages": ADVANTAGES, "mask": MASK, "ref": ref,
            "sampler": sampler, "entropies": rng.uniform(0.1, 3, old.shape)}  # fmt: skip


DATA = made_up()
TRAINED = ("logprobs", "entropies")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def terms(case: Case, data):
    """Numerator, denominator, metrics: all arrays are given, as `update` does."""
    arrays = {"sampler_logprobs": data["sampler"], "entropies": data["entropies"]}
    if case.to_base:
        arrays["ref_logprobs"] = data["ref"]
    given = (jnp.asarray(data[name]) for name in ("logprobs", "old", "advantages", "mask"))
    return LOSSES[case.name](*given, **arrays, **case.options)


def value_and_gradient(case: Case, data):
    """The loss, and its gradient by logprobs and by entropies."""

    def loss(trained):
        numerator, denominator, metrics = terms(case, data | trained)
        return numerator / denominator, metrics

    return jax.value_and_grad(loss, has_aux=True)({k: jnp.asarray(data[k]) for k in TRAINED})


def test_the_data_lie_on_all_sides_of_every_bound():
    log_ratios, n_tokens = (DATA["logprobs"] - DATA["old"]) * MASK, MASK.sum(axis=1).astype(int)
    sums = log_ratios.sum(axis=1)
    of_completions, of_tokens = ADVANTAGES[:4], np.repeat(ADVANTAGES, n_tokens)
    for log_ratio, a, low, high in (
        (log_ratios[MASK > 0], of_tokens, 0.8, 1.2),
        (log_ratios[MASK > 0], of_tokens, 0.9, 1.15),
        (sums[:4] / n_tokens[:4], of_completions, 0.9, 1.15),
        (sums[:4], of_completions, 0.9, 1.15),
    ):
        ratio = np.exp(log_ratio)
        assert ((ratio > high) & (a > 0)).any()  # bounded
        assert ((ratio < low) & (a < 0)).any()
        assert ((ratio > high) & (a < 0)).any()  # outside as well, but pulled back
        assert ((ratio > low) & (ratio < high)).any()
    weights = np.exp(DATA["old"] - DATA["sampler"])[MASK > 0]
    assert weights.min() < 0.9 < 1.1 < weights.max()


# -- against PyTorch ------------------------------------------------------------------------------


def clipped(ratio, a: float, clip_eps=None, clip_eps_high=None, clip_delta=None):
    """PPO's objective by the advantage's sign: better has a ceiling, worse a floor."""
    if clip_eps is None:
        return -ratio * a
    if a > 0:
        return -torch.clamp(ratio, max=1 + (clip_eps_high or clip_eps)) * a
    return -torch.clamp(ratio, min=1 - clip_eps, max=clip_delta) * a


def policy_terms(name: str, p: list, p_old: list, a: float, options: dict) -> list:
    """What is minimised on each token of one completion, from its tokens' probabilities."""
    ratios = [new / old for new, old in zip(p, p_old, strict=True)]
    if name == "sapo":
        tau = options.get("tau_positive", 1.0) if a > 0 else options.get("tau_negative", 1.05)
        return [-4 / tau * a / (1 + torch.exp(-tau * (ratio - 1))) for ratio in ratios]
    if name == "dppo":
        moved = [
            (new - old).item() * math.copysign(1, a) for new, old in zip(p, p_old, strict=True)
        ]
        far = [m > options["max_difference"] for m in moved]
        return [0 * r if out else -r * a for r, out in zip(ratios, far, strict=True)]
    bounds = {k: v for k, v in options.items() if k.startswith("clip")}
    if name == "cispo":
        weights = [min(ratio.item(), options["max_ratio"]) for ratio in ratios]
        return [-w * a * new.log() for w, new in zip(weights, p, strict=True)]
    if name in ("gspo", "rloo"):
        whole = math.prod(ratios) ** (1 / len(ratios) if name == "gspo" else 1)
        ratios = [whole] * len(ratios)
    return [clipped(ratio, a, **bounds) for ratio in ratios]


def kl_term(estimator: str, odds):
    """Schulman's estimators, from the odds p / q of a sample from q."""
    return {"k1": -odds.log(), "k2": odds.log() ** 2 / 2, "k3": odds - 1 - odds.log()}[estimator]


def torch_loss(case: Case, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss, by design.md's table: one completion after another, a token at a time."""
    name, options, to_base = case
    n_tokens = int(data["mask"].sum())
    loss = torch.tensor(0.0, dtype=torch.float64)
    for n, a in enumerate(ADVANTAGES.tolist()):
        places = [t for t in range(5) if MASK[n, t]]
        if not places:
            continue
        p, p_old, p_base, p_sampler = (
            [data[key][n, t].exp() for t in places] for key in ("logprobs", "old", "ref", "sampler")
        )
        if name == "cispo" or options.get("token_level"):
            share = 1 / n_tokens
        elif name == "dr_grpo":
            share = 1 / (len(MASK) * options["max_tokens"])
        else:
            share = 1 / (len(MASK) * len(places))
        for i, term in enumerate(policy_terms(name, p, p_old, a, options)):
            if "importance_cap" in options:
                level, beyond = options.get("importance_mode", "token_truncate").split("_")
                each = [(old / s).item() for old, s in zip(p_old, p_sampler, strict=True)]
                weight, cap = each[i] if level == "token" else math.prod(each), WEIGHTS_CAP
                term = term * (weight if weight <= cap else cap * (beyond == "truncate"))
            if "beta" in options:
                odds = p_base[i] / p[i] if to_base else p[i] / p_old[i]
                kl = kl_term(options.get("kl_estimator", "k3"), odds)
                kl = kl * p[i] / p_old[i] if options.get("kl_weighted") else kl
                term = term + options["beta"] * kl
            term = term - options.get("entropy_coef", 0) * data["entropies"][n, places[i]]
            loss = loss + share * term
    return loss


@each_case
def test_value_and_gradient_equal_torch(case):
    (value, _), gradient = value_and_gradient(case, DATA)
    data = {k: torch.tensor(v, requires_grad=k in TRAINED) for k, v in DATA.items()}
    expected = torch_loss(case, data)
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-9)
    for key in TRAINED:
        by_torch = data[key].grad
        assert (by_torch is not None) or key == "entropies"
        by_torch = np.zeros(MASK.shape) if by_torch is None else by_torch.numpy()
        np.testing.assert_allclose(gradient[key], by_torch, rtol=1e-9, atol=1e-15)


# -- against finite differences -------------------------------------------------------------------


WEIGHTS_ALONE = [c for c in CASES if c.name != "cispo" or "beta" not in c.options or c.to_base]


@pytest.mark.parametrize("case", marked(WEIGHTS_ALONE), ids=str)
def test_gradient_equals_finite_differences(case):
    """By every logprob and every entropy. CISPO's weights are constants: there old and sampler
    logprobs move along, which keeps the weights (and would keep a KL to the old policy as well)."""

    def loss(step, key):
        moved = DATA | {key: DATA[key] + step}
        if case.name == "cispo" and key == "logprobs":
            moved |= {k: DATA[k] + step for k in ("old", "sampler")}
        numerator, denominator, _ = terms(case, moved)
        return numerator / denominator

    _, gradient = value_and_gradient(case, DATA)
    steps = 1e-5 * np.eye(MASK.size).reshape(-1, *MASK.shape)
    for key in TRAINED:
        up, down = (jax.vmap(partial(loss, key=key))(s) for s in (steps, -steps))
        np.testing.assert_allclose(
            gradient[key].reshape(-1), (up - down) / 2e-5, rtol=1e-7, atol=1e-9
        )


# -- what must not matter -------------------------------------------------------------------------


def with_junk(data, junk: float, names=("logprobs", "old", "ref", "sampler")):
    """Something else wherever the mask is 0."""
    return data | {name: np.where(data["mask"] > 0, data[name], junk) for name in names}


@each_case
def test_nothing_leaks_from_outside_the_mask(case):
    clean = value_and_gradient(case, DATA)
    assert not np.asarray(clean[1]["logprobs"])[MASK == 0].any()
    for junk in (math.inf, -math.inf, math.nan, 1e4):
        got = value_and_gradient(case, with_junk(DATA, junk))
        jax.tree.map(np.testing.assert_array_equal, got, clean)
    got = value_and_gradient(case, with_junk(DATA, 1e4, names=["entropies"]))
    jax.tree.map(np.testing.assert_array_equal, got, clean)


@each_case
def test_numerators_of_micro_batches_add_up(case):
    # The denominator is that of the whole, which the update knows from the lengths alone.
    whole = terms(case, DATA)
    parts = [terms(case, {k: v[rows] for k, v in DATA.items()}) for rows in ([0, 2, 4], [3, 1])]
    for total, *of_parts in zip(*(jax.tree.leaves(t[::2]) for t in (whole, *parts)), strict=True):
        assert float(total) == pytest.approx(float(sum(of_parts)), rel=1e-12)
    loss = partial(LOSSES[case.name], **case.options)
    assert loss_denominator(loss, MASK) == whole[1]


@each_case
def test_padding_changes_nothing(case):
    # Columns on both sides and rows that fill up; of these the update's denominator knows nothing.
    (loss, metrics), gradient = value_and_gradient(case, DATA)
    pad = {2: ((0, 2), (2, 1)), 1: (0, 2)}
    wide = with_junk({k: np.pad(v, pad[v.ndim]) for k, v in DATA.items()}, math.nan)
    (padded_loss, padded_metrics), padded = value_and_gradient(case, wide)
    denominator, padded_denominator = (terms(case, data)[1] for data in (DATA, wide))
    assert float(padded_loss * padded_denominator) == pytest.approx(
        float(loss * denominator), rel=1e-12
    )
    close = partial(np.testing.assert_allclose, rtol=1e-12)
    jax.tree.map(close, padded_metrics, metrics)
    for key in TRAINED:
        inside = padded[key][:5, 2:7]
        close(inside * padded_denominator, gradient[key] * denominator)
        np.testing.assert_array_equal(padded[key], np.pad(inside, pad[2]))


@each_case
def test_a_leading_axis_and_jit_give_the_same(case):
    # jit(vmap(loss)) over two policies equals the loss of each.
    policies = np.stack([DATA["logprobs"], DATA["old"] - 0.05])
    both = jax.jit(jax.vmap(lambda x: terms(case, DATA | {"logprobs": x})))(policies)
    for i, logprobs in enumerate(policies):
        one = terms(case, DATA | {"logprobs": logprobs})
        got = jax.tree.map(lambda x, i=i: x[i], both)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, one)


# -- limits ---------------------------------------------------------------------------------------

EQUAL_LENGTHS = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]] * 2 + [[0, 0, 0, 1, 1]], float)
ONE_TOKEN = np.eye(5)
LENGTHS = MASK.sum(axis=1, keepdims=True)
ON_POLICY = {"logprobs": DATA["old"]}
ALL = [Case("grpo", {}), Case("dr_grpo", {"max_tokens": 7}), Case("gspo", {}), Case("rloo", {}),
       Case("cispo", {"max_ratio": 1.2}), Case("sapo", {}), Case("dppo", {})]  # fmt: skip
each_loss = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)


def of(name: str, changes=None, **options):
    """A loss's value, and its gradient by the logprobs; `changes` of DATA."""
    (value, _), gradient = value_and_gradient(Case(name, options), DATA | (changes or {}))
    assert gradient["logprobs"].any()
    return np.asarray(value), np.asarray(gradient["logprobs"])


def assert_same(one, other, *, factor=1.0):
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, factor * y, rtol=1e-12)


@pytest.mark.parametrize("case", ALL[:4], ids=lambda case: case.name)
def test_on_policy_a_clip_changes_nothing(case):
    plain = of(case.name, ON_POLICY, **case.options)
    assert_same(of(case.name, ON_POLICY, **case.options, **HIGHER), plain)
    off_policy = of(case.name, **case.options)
    assert not np.allclose(of(case.name, **case.options, **HIGHER)[1], off_policy[1])


@pytest.mark.parametrize("options", [{}, HIGHER], ids=str)
def test_with_one_token_a_completion_gspo_grpo_and_rloo_are_one(options):
    grpo, gspo, rloo = (of(x, {"mask": ONE_TOKEN}, **options) for x in ("grpo", "gspo", "rloo"))
    assert_same(gspo, grpo)
    assert_same(rloo, grpo)


@pytest.mark.parametrize("token_level", [False, True])
def test_on_policy_gspo_is_grpo(token_level):
    gspo, grpo = (of(name, ON_POLICY, token_level=token_level) for name in ("gspo", "grpo"))
    assert_same(gspo, grpo)


def test_on_policy_rloo_has_length_times_the_gradient_of_gspo():
    (_, rloo), (_, gspo) = (of(name, ON_POLICY) for name in ("rloo", "gspo"))
    np.testing.assert_allclose(rloo, LENGTHS * gspo, rtol=1e-12)


@pytest.mark.parametrize("mask", [MASK, EQUAL_LENGTHS], ids=["ragged", "equal"])
def test_dr_grpo_is_token_level_grpo_but_for_a_constant(mask):
    # tokens / (completions x max_tokens) = 10 / (5 x 7), whatever the lengths.
    options = {"clip_eps": 0.2, "beta": 0.1}
    token_level = of("grpo", {"mask": mask}, token_level=True, **options)
    assert_same(of("dr_grpo", {"mask": mask}, max_tokens=7, **options), token_level, factor=10 / 35)


def test_dr_grpo_is_grpo_weighted_by_length_over_max_tokens():
    # With equal lengths that is a constant: 2 / 7. Token level is then GRPO itself.
    _, ragged = of("grpo", clip_eps=0.2)
    np.testing.assert_allclose(
        of("dr_grpo", max_tokens=7, clip_eps=0.2)[1], LENGTHS / 7 * ragged, rtol=1e-12
    )
    equal = {"mask": EQUAL_LENGTHS}
    grpo = of("grpo", equal, clip_eps=0.2)
    assert_same(of("dr_grpo", equal, max_tokens=7, clip_eps=0.2), grpo, factor=2 / 7)
    assert_same(of("grpo", equal, clip_eps=0.2, token_level=True), grpo)


@pytest.mark.parametrize("changes", [ON_POLICY, {}], ids=["on policy", "off policy"])
def test_below_its_cap_cispo_has_the_gradient_of_token_level_grpo(changes):
    # d(ratio A) = ratio A dlogprob, also where the ratio is not 1. The values are other things.
    cispo, grpo = of("cispo", changes, max_ratio=9.0), of("grpo", changes, token_level=True)
    np.testing.assert_allclose(cispo[1], grpo[1], rtol=1e-12)
    assert abs(cispo[0] - grpo[0]) > 0.1


@each_loss
def test_a_sampler_that_reports_the_old_logprobs_changes_no_bit(case):
    weighed = of(case.name, {"sampler": DATA["old"]}, **case.options, importance_cap=2.0)
    jax.tree.map(np.testing.assert_array_equal, weighed, of(case.name, **case.options))


@each_loss
def test_a_cap_below_all_weights_scales_the_policy_term(case):
    weighed = of(case.name, {"sampler": DATA["old"] + 0.3}, **case.options, importance_cap=0.25)
    assert_same(weighed, of(case.name, **case.options), factor=0.25)


@each_loss
def test_a_beta_or_a_coefficient_of_zero_changes_no_bit(case):
    for to_base in (False, True):
        zeros = Case(case.name, case.options | {"beta": 0.0, "entropy_coef": 0.0}, to_base)
        got, expected = value_and_gradient(zeros, DATA), value_and_gradient(case, DATA)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
