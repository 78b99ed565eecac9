"""Does a server sample each member from its own adapter, after every load?

The probe has shown it before the first step. Later the members' policies may be closer to each
other than any limit on a step's mean gap; but a member's logprobs are then still nearer to the
adapter that it was sampled from. What rounding explains is known from the probe.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from jgrpo.config import Config
from jgrpo.errors import RunError
from jgrpo.rollout.protocol import Sampler
from jgrpo.run.policy import Policy
from jgrpo.run.probe import gaps_of, probe_prompts, short_completions
from jgrpo.run.session import Problems

CLEARLY = 3.0
"""So many times further from its own adapter than rounding, and than from another one."""
LOOKS = 3
"""In a row that must say so, each at other completions: in 16 bits a token's rounding may look like
another adapter once."""


def check_members(
    configs: Sequence[Config],
    policy: Policy,
    sampler: Sampler,
    problems: Problems,
    adapters: Mapping[int, nnx.State],
    *,
    names: Sequence[str],
    rounding: float,
    seed: int,
) -> None:
    """RunError if the completions of a member are another one's. `adapters` are those that were
    loaded, of the members that take part; `rounding` is the probe's mean gap. A few tokens a member
    are sampled, and computed by its own adapter; by the others' only where that does not fit."""
    members, first = [*adapters], None
    for look in range(LOOKS):
        seeds = seed * LOOKS + look
        found = _found(configs, policy, sampler, problems, adapters, members, rounding, seeds)
        first = first or found
        members = [e for e, f in found.items() if first[e] == f]
        if not members:
            return
    assert first
    of = lambda e: f"{names[e]} is sampled from the adapter of {names[first[e]]}"  # noqa: E731
    raise RunError(
        f"the sampler mixes adapters up: {'; '.join(map(of, members))} ({LOOKS} looks at its "
        f"logprobs). Does the server hold {len(configs)} at once? (python -m jgrpo.serve "
        f"--max_loras {len(configs)} starts it as the trainer needs it)"
    )


def _found(configs, policy, sampler, problems, adapters, members, rounding, seed) -> dict[int, int]:
    """The members of these whose completions are clearly another one's -> whose."""
    prompts = probe_prompts(problems)
    sampled = short_completions(configs, members, sampler, prompts, seed)
    found = {}
    for e, completions in sampled.items():

        def gap_to(f: int, completions=completions) -> float:
            temperature = configs[f].temperature
            gaps = gaps_of(policy, f, adapters[f], prompts, completions, temperature)
            return float(np.abs(gaps).mean())

        if (own := gap_to(e)) > CLEARLY * rounding:
            others = {f: gap_to(f) for f in adapters if f != e}
            nearest = min(others, key=others.__getitem__)
            if own > CLEARLY * others[nearest]:
                found[e] = nearest
    return found
