"""Health at a glance: what to look at in a run, and the value from which one should worry.

None of these is a law. Each says where the number comes from; a run above it deserves a look at its
completions before it deserves trust.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GAP = {"float32": 1e-4, "float16": 0.00625, "bfloat16": 0.05}
"""A tenth, in 16 bits a half, of the means at which a run ends by itself (max_mean_logprob_diff);
float32 is at 1e-6 as a rule, float16 at 0.003, bfloat16 at 0.02 to 0.03."""


@dataclass(frozen=True)
class Measure:
    """One figure of a step, and from where on it is a worry."""

    tag: str
    title: str
    unit: str
    worry: float
    why: str


def measures(config: Mapping[str, Any]) -> list[Measure]:
    """What is looked at, of a run with these options."""
    return [
        Measure("sampler/logprob_diff_mean", "Gap between sampler and trainer", "nats",
                GAP.get(str(config.get("dtype")), GAP["bfloat16"]),
                "Mean difference of the logprobs that sampler and trainer give the same tokens. "
                "Above this the samples are not the policy's: look at dtype and server options."),
        Measure("train/zero_advantage_fraction", "Completions without an advantage", "share", 0.8,
                "Their groups are all right or all wrong and teach nothing. Above this, problems "
                "are too easy or too hard: change them, or use_dynamic_sampling."),
        Measure("train/truncated_fraction", "Cut off by max_tokens", "share", 0.1,
                "Their answers cannot be seen, and count as wrong. Above this, length is trained "
                "instead of correctness: raise max_tokens."),
        Measure("train/skipped_updates", "Updates skipped", "a step", 0.0,
                "Loss or gradient was not finite. More than none is a worry; three in a row end "
                "the run."),
        Measure("reward/unsure", "Answers not checked", "completions", 0.0,
                "The grader failed on them or ran out of time; they count as wrong."),
    ]  # fmt: skip


Series = tuple[list[int], list[float | None]]
"""Steps and values of one tag."""
PHASES = ("generation", "reward", "training", "export", "reload")


def health(config: Mapping[str, Any], metrics: Mapping[str, Series]) -> list[dict[str, Any]]:
    """Each measure with its last and worst value, and whether that is a worry; what a run did not
    log is left out. A value that is not finite is logged as null, and is one."""
    found = []
    every = dict(metrics) | _unsure(metrics)
    for m in measures(config):
        steps, values = every.get(m.tag, ([], []))
        if not steps:
            continue
        known = [(v, s) for s, v in zip(steps, values, strict=True) if v is not None]
        worst, at = max(known, default=(None, steps[-1]), key=lambda pair: (pair[0], -pair[1]))
        lost = len(values) - len(known)
        found.append({**vars(m), "steps": steps, "values": values, "last": values[-1],
                      "worst": worst, "at": at, "not_finite": lost,
                      "worrying": sum(v > m.worry for v, _ in known) + lost})  # fmt: skip
    return found


def _unsure(metrics: Mapping[str, Series]) -> dict[str, Series]:
    parts = [metrics[t] for t in ("reward/errors", "reward/timeouts") if t in metrics]
    if not parts or any(p[0] != parts[0][0] for p in parts):
        return {}
    sums = [sum(v or 0 for v in values) for values in zip(*(p[1] for p in parts), strict=True)]
    return {"reward/unsure": (parts[0][0], [float(s) for s in sums])}


def where_time_went(metrics: Mapping[str, Series]) -> dict[str, float]:
    """Seconds of the whole run by phase, compilation in each; "other" is the rest of the steps,
    and evaluations come on top. Where rollouts ran ahead, what the trainer waited for them stands
    in place of what they took."""
    total = {t.removeprefix("time/"): sum(v or 0.0 for v in values)
             for t, (_, values) in metrics.items() if t.startswith("time/")}  # fmt: skip
    whole = total.pop("step", 0.0)
    ahead = any(metrics.get("staleness/steps", ([], []))[1])
    names = ("waiting", *PHASES[2:]) if ahead else PHASES
    phases = {name: total[name] for name in names if name in total}
    rest = max(0.0, whole - sum(phases.values()))
    evaluation = {name: total[name] for name in ("evaluation",) if name in total}
    return {**phases, **({"other": rest} if whole else {}), **evaluation}
