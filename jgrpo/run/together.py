"""What all processes of a run compute (`hosts`): the first one's policy, learner and sampler, and
the others, which follow them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jgrpo.config import Config
from jgrpo.errors import RunError
from jgrpo.policy.batch import MicroBatch, Rows
from jgrpo.policy.mesh import make_mesh
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.rollout.protocol import Completion
from jgrpo.run.hosts import heard, told
from jgrpo.run.policy import Policy, open_policies
from jgrpo.update import Learner

Message = dict[str, np.ndarray]


# -- the first process's: what they compute, the others do too -------------------------------------


class SharedPolicy(Policy):
    """What is computed from it by the base as it lies, on the devices of all."""

    def logprobs(
        self, e: int, adapter: nnx.State, batch: MicroBatch, temperature: float, in_float32=False
    ) -> np.ndarray:
        adapter, given = jax.device_get(adapter), (e, temperature, in_float32)
        message = under("adapter", leaves(adapter)) | under("batch", leaves(batch))
        with told("policy_logprobs", message | {"given": np.array(given)}):
            return super().logprobs(e, adapter, batch, temperature, in_float32)


class SharedLearner(Learner):
    """What changes its state, or is computed from it."""

    def learn(self, rows: Mapping[int, Rows]) -> dict[int, dict[str, float]]:
        message = {k: x for e, r in rows.items() for k, x in under(str(e), as_arrays(r)).items()}
        with told("learn", message):
            return super().learn(rows)

    def set_state(self, e: int, state: Any) -> None:
        with told("set_state", {"e": np.array(e)} | leaves(state)):
            super().set_state(e, state)

    def rehearse(self, batch: MicroBatch) -> None:
        with told("rehearse", leaves(batch)):
            super().rehearse(batch)

    def logprobs_by(self, adapters: Any, rows: Rows, index: np.ndarray) -> np.ndarray:
        message = leaves(adapters) | {"index": index} | under("rows", as_arrays(rows))
        with told("logprobs", message):
            return super().logprobs_by(adapters, rows, index)


class SharedSampler(JaxSampler):
    """Its adapter is told with what is asked: the others may not see the folder."""

    def sample(self, prompts, **options) -> list[list[Completion]]:
        self.adapter = jax.device_get(self.adapter)
        given = {k: x for k, x in options.items() if k != "progress" and x is not None}
        message = {k: np.asarray(x) for k, x in given.items()} | joined("prompts", prompts)
        with told("sample", under("adapter", leaves(self.adapter)) | under("asked", message)):
            return super().sample(prompts, **options)


def open_shared(configs: Sequence[Config]) -> SharedPolicy:
    """`open_policies` in all processes."""
    with told("open"):
        return SharedPolicy(*open_policies(configs).parts)


def new_learner(configs: Sequence[Config], policy: Policy) -> SharedLearner:
    with told("learner"):
        return learner_of(SharedLearner, configs, policy)


def new_sampler(
    config: Config, policy: Policy, stops: Sequence[int], max_rows: int
) -> SharedSampler:
    with told("sampler", {"stops": np.array(stops), "max_rows": np.array(max_rows)}):
        return sampler_of(SharedSampler, config, policy, stops, max_rows)


def learner_of(kind: Any, configs: Sequence[Config], policy: Policy) -> Any:
    p = policy
    return kind(configs, p.graph, p.adapter, p.base, scales=p.scales)


def sampler_of(kind: Any, config: Config, policy: Policy, stops, max_rows: int) -> Any:
    p = policy
    return kind(
        p.graph, p.adapter, p.base, scales=p.scales, ranks=p.ranks, mesh=make_mesh(config.fsdp),
        stop_token_ids=stops, max_tokens=config.max_tokens, max_rows=max_rows,
    )  # fmt: skip


# -- the others ------------------------------------------------------------------------------------


def follow(configs: Sequence[Config]) -> None:
    """What the other processes do, until the first one ends. RunError if it has failed."""
    mine = Follower(configs)
    while (what := heard())[0] != "done":
        name, message = what
        if name == "failed":
            raise RunError("the first process of this run has failed; it says why")
        mine.does[name](message)


class Follower:
    """What it does when it is told `what`, as the first process does."""

    policy: Policy
    learner: Learner
    sampler: JaxSampler

    def __init__(self, configs: Sequence[Config]) -> None:
        self.configs = configs
        self.does = {
            "open": self.open,
            "learner": self.new_learner,
            "sampler": self.new_sampler,
            "policy_logprobs": self.policy_logprobs,
            "learn": self.learn,
            "set_state": self.set_state,
            "rehearse": lambda message: self.learner.rehearse(batch_of(message)),
            "logprobs": self.logprobs,
            "sample": self.sample,
        }

    def open(self, message: Message) -> None:
        self.policy = open_policies(self.configs)

    def new_learner(self, message: Message) -> None:
        self.learner = learner_of(Learner, self.configs, self.policy)

    def new_sampler(self, message: Message) -> None:
        stops, max_rows = message["stops"].tolist(), int(message["max_rows"])
        self.sampler = sampler_of(JaxSampler, self.configs[0], self.policy, stops, max_rows)

    def policy_logprobs(self, message: Message) -> None:
        e, temperature, in_float32 = message["given"].tolist()
        like = jax.tree.map(lambda x: x[0], self.policy.adapter)
        adapter = of_leaves(like, part(message, "adapter"))
        batch = batch_of(part(message, "batch"))
        self.policy.logprobs(int(e), adapter, batch, temperature, bool(in_float32))

    def learn(self, message: Message) -> None:
        members = sorted({int(key.split(".")[0]) for key in message})
        self.learner.learn({e: as_rows(part(message, str(e))) for e in members})

    def set_state(self, message: Message) -> None:
        e = int(message["e"])
        self.learner.set_state(e, of_leaves(self.learner.state(e), message))

    def logprobs(self, message: Message) -> None:
        adapters, rows = of_leaves(self.learner.adapters, message), as_rows(part(message, "rows"))
        self.learner.logprobs_by(adapters, rows, message["index"])

    def sample(self, message: Message) -> None:
        asked = part(message, "asked")
        prompts = parted("prompts", asked)
        options = {k: x.tolist() for k, x in asked.items() if not k.startswith("prompts")}
        self.sampler.adapter = of_leaves(self.sampler.adapter, part(message, "adapter"))
        self.sampler.sample(prompts, **options)


# -- as bytes --------------------------------------------------------------------------------------


def under(name: str, message: Message) -> Message:
    return {f"{name}.{key}": x for key, x in message.items()}


def part(message: Message, name: str) -> Message:
    """What is `under` that name."""
    start = f"{name}."
    return {k.removeprefix(start): x for k, x in message.items() if k.startswith(start)}


def leaves(tree: Any) -> Message:
    """A tree's arrays under their numbers."""
    return {f"leaf {i}": x for i, x in enumerate(map(np.asarray, jax.tree.leaves(tree)))}


def of_leaves(like: Any, message: Message) -> Any:
    """The tree of that structure."""
    n = len(jax.tree.leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), [message[f"leaf {i}"] for i in range(n)])


def batch_of(message: Message) -> MicroBatch:
    return MicroBatch(*(message[f"leaf {i}"] for i in range(len(MicroBatch._fields))))


def joined(name: str, lists: Sequence[Sequence], dtype: Any = np.int32) -> Message:
    """Lists one after another, with their lengths."""
    values = np.array([x for row in lists for x in row], dtype)
    return {f"{name} lengths": np.array([len(x) for x in lists]), name: values}


def parted(name: str, message: Message) -> list[list]:
    """Those lists."""
    ends = np.cumsum(message[f"{name} lengths"])[:-1]
    return [x.tolist() for x in np.split(message[name], ends)]


RAGGED = {"prompts": np.int32, "completions": np.int32, "sampler_logprobs": np.float64}


def as_arrays(rows: Rows) -> Message:
    """A rollout; its lists one after another."""
    found = {"advantages": rows.advantages}
    for name, dtype in RAGGED.items():
        found |= joined(name, getattr(rows, name), dtype)
    optional = {name: getattr(rows, name) for name in ("trained", "members")}
    return found | {name: x for name, x in optional.items() if x is not None}


def as_rows(message: Message) -> Rows:
    """The rollout again."""
    prompts, completions, logprobs = (parted(name, message) for name in RAGGED)
    optional = (message.get(name) for name in ("trained", "members"))
    return Rows(prompts, completions, logprobs, message["advantages"], *optional)
