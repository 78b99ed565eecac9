"""Updates that all processes of a run compute (`hosts`): the first one's learner, and the others,
which follow it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jgrpo.config import Config
from jgrpo.errors import RunError
from jgrpo.policy.batch import MicroBatch, Rows
from jgrpo.run.hosts import heard, told
from jgrpo.run.policy import open_policies
from jgrpo.run.session import Session
from jgrpo.update import Learner

Message = dict[str, np.ndarray]


class SharedLearner(Learner):
    """The first process's: what it computes, the others do too."""

    def learn(self, rows: Mapping[int, Rows]) -> dict[int, dict[str, float]]:
        message = {f"{e}.{k}": x for e, r in rows.items() for k, x in as_arrays(r).items()}
        with told("learn", message):
            return super().learn(rows)

    def set_state(self, e: int, state: Any) -> None:
        with told("set_state", {"e": np.array(e)} | leaves(state)):
            super().set_state(e, state)

    def rehearse(self, batch: MicroBatch) -> None:
        with told("rehearse", leaves(batch)):
            super().rehearse(batch)

    def logprobs_by(self, adapters: Any, rows: Rows, index: np.ndarray) -> np.ndarray:
        message = leaves(adapters) | {"index": index}
        with told("logprobs", message | {f"rows.{k}": x for k, x in as_arrays(rows).items()}):
            return super().logprobs_by(adapters, rows, index)


def new_learner(session: Session) -> SharedLearner:
    configs, policy = session.configs, session.policy
    with told("learner"):
        return SharedLearner(
            configs, policy.graph, policy.adapter, policy.base, scales=policy.scales
        )


def follow(configs: Sequence[Config]) -> None:
    """What the other processes do, until the first one ends. RunError if it has failed."""
    policy: Any = None
    learner: Any = None
    while (what := heard())[0] != "done":
        name, message = what
        if name == "failed":
            raise RunError("the first process of this run has failed; it says why")
        if name == "open":
            policy = open_policies(configs)
        elif name == "learner":
            learner = Learner(
                configs, policy.graph, policy.adapter, policy.base, scales=policy.scales
            )
        elif name == "learn":
            members = sorted({int(key.split(".")[0]) for key in message})
            learner.learn({e: as_rows(message, f"{e}.") for e in members})
        elif name == "set_state":
            e = int(message["e"])
            learner.set_state(e, of_leaves(learner.state(e), message))
        elif name == "rehearse":
            batch = MicroBatch(*(message[f"leaf {i}"] for i in range(len(MicroBatch._fields))))
            learner.rehearse(batch)
        elif name == "logprobs":
            adapters = of_leaves(learner.adapters, message)
            learner.logprobs_by(adapters, as_rows(message, "rows."), message["index"])


def leaves(tree: Any) -> Message:
    """A tree's arrays under their numbers."""
    return {f"leaf {i}": x for i, x in enumerate(map(np.asarray, jax.tree.leaves(tree)))}


def of_leaves(like: Any, message: Message) -> Any:
    """The tree of that structure."""
    n = len(jax.tree.leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), [message[f"leaf {i}"] for i in range(n)])


RAGGED = {"prompts": np.int32, "completions": np.int32, "sampler_logprobs": np.float64}


def as_arrays(rows: Rows) -> Message:
    """A rollout's lists one after another, with their lengths."""
    found = {"advantages": rows.advantages}
    for name in RAGGED:
        lists = getattr(rows, name)
        found[f"{name} lengths"] = np.array([len(x) for x in lists])
        found[name] = np.array([x for row in lists for x in row], RAGGED[name])
    optional = {name: getattr(rows, name) for name in ("trained", "members")}
    return found | {name: x for name, x in optional.items() if x is not None}


def as_rows(message: Message, prefix: str) -> Rows:
    """The rollout again."""
    mine = {k.removeprefix(prefix): x for k, x in message.items() if k.startswith(prefix)}
    lists = {
        name: [x.tolist() for x in np.split(mine[name], np.cumsum(mine[f"{name} lengths"])[:-1])]
        for name in RAGGED
    }
    return Rows(
        **lists,
        advantages=mine["advantages"],
        trained=mine.get("trained"),
        members=mine.get("members"),
    )
