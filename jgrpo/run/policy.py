"""The policy that a config names: a base, and the adapters that are trained over it."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgrpo.config import PROJECTIONS, Config
from jgrpo.errors import InputError, printable
from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import MicroBatch
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.lora import fresh_adapter, side_by_side, split, stacked_up, with_rank
from jgrpo.policy.mesh import fetched, lies, make_mesh
from jgrpo.policy.tracing import traced
from jgrpo.policy.weights import abstract_model, load_model, model_folder
from jgrpo.run.rundir import last_adapter, run_of_adapter

log = logging.getLogger(__name__)
SHAPE = ("lora_r", "lora_alpha", "lora_target_modules")
"""Options that an adapter brings with it."""


@dataclass(frozen=True)
class Policy:
    """The model, split into structure, adapter and frozen base. The adapter is one, or those of E
    members, [E, ...] (`scales` and `ranks` as in `lora.side_by_side`)."""

    graph: nnx.GraphDef
    adapter: nnx.State
    base: nnx.State
    scales: tuple[float, ...] = (1.0,)
    ranks: tuple[int, ...] | None = None

    @property
    def parts(self) -> tuple[Any, ...]:
        """Of which the same policy is made again, in field order."""
        return self.graph, self.adapter, self.base, self.scales, self.ranks

    def logprobs(
        self,
        e: int,
        adapter: nnx.State,
        batch: MicroBatch,
        temperature: float,
        in_float32: bool = False,
    ) -> np.ndarray:
        """A micro-batch's, float32 [N, U], by another adapter of member e's shape; `in_float32` its
        products are, from the embedding on, whatever the base is in."""
        given = adapter, self.base, batch, self.scales[e], temperature
        return fetched(_logprobs(self.graph, in_float32, *given))


@jax.jit(static_argnums=(0, 1))
def _logprobs(graph, in_float32: bool, adapter, base, batch: MicroBatch, scale, temperature):
    traced("logprobs of a policy", f"{batch.rows.shape[0]} rows of {batch.rows.shape[1]}")

    def one(path, leaf):
        return leaf.replace(leaf[...].astype(jnp.float32)) if path[-1] == "embedding" else leaf

    if in_float32:
        base = nnx.from_flat_state((path, one(path, x)) for path, x in nnx.to_flat_state(base))
    model = nnx.merge(graph, side_by_side(stacked_up([adapter]), [scale]), base)
    return token_logprobs(model, batch, temperature=temperature)[0]


def open_policy(config: Config, *, abstract: bool = False) -> Policy:
    """The base model with a fresh adapter, or the one that the config begins from; `abstract`:
    shapes alone, for who only needs those. InputError if that adapter does not fit the model."""
    if config.attn_implementation == "cudnn" and (found := jax.default_backend()) != "gpu":
        raise InputError(f"attn_implementation=cudnn needs a GPU, JAX has {found}; take xla")
    folder = model_folder(config.model_id)
    shape: dict[str, Any] = {
        "dtype": config.dtype,
        "rank": config.lora_r,
        "alpha": config.lora_alpha,
        "target_modules": config.lora_target_modules,
    }
    shapes, mesh = Policy(*split(abstract_model(folder, **shape))), make_mesh(config.fsdp)
    for path, leaf in nnx.to_flat_state(shapes.base):
        lies(mesh, path, leaf.shape)  # or says why not
    start = adapters.load(Path(config.adapter), shapes.adapter) if config.adapter else None
    if config.adapter:
        _warn_of_another_base(config)
    if abstract:
        return shapes
    policy = Policy(*split(load_model(folder, **shape, seed=config.seed, mesh=mesh)))
    return policy if start is None else replace(policy, adapter=start)


def _warn_of_another_base(config: Config) -> None:
    """An adapter fits any model of its shape; the name of its base tells those apart."""
    named = adapters.base_of(Path(config.adapter))
    if named and Path(named).name != Path(config.model_id).name:
        log.warning("adapter=%s was made for the base %s, and model_id is %s: on other weights it "
                    "is no start", config.adapter, printable(named), config.model_id)  # fmt: skip


def open_policies(configs: Sequence[Config], *, abstract: bool = False) -> Policy:
    """`open_policy` of each member over one base: adapters [E, ...], the smaller ones filled up
    with zeros to the largest rank."""
    if len(configs) == 1:
        policy = open_policy(configs[0], abstract=abstract)
        return replace(policy, adapter=jax.eval_shape(stacked_up, [policy.adapter])
                       if abstract else stacked_up([policy.adapter]))  # fmt: skip
    rank = max(c.lora_r for c in configs)
    alike = replace(configs[0], lora_r=rank, lora_alpha=rank, adapter="")  # a scale of 1
    policy = open_policy(alike, abstract=abstract)
    scales = tuple(c.lora_alpha / c.lora_r for c in configs)
    like = [jax.eval_shape(lambda a, r=c.lora_r: with_rank(a, r), policy.adapter) for c in configs]

    for config in configs:
        if config.adapter:
            _warn_of_another_base(config)

    def adapters_of_all() -> nnx.State:
        each = [
            adapters.load(Path(c.adapter), own) if c.adapter else fresh_adapter(own, c.seed)
            for c, own in zip(configs, like, strict=True)
        ]
        return stacked_up([with_rank(adapter, rank) for adapter in each])

    found = jax.eval_shape(adapters_of_all) if abstract else adapters_of_all()
    return replace(policy, adapter=found, scales=scales, ranks=tuple(c.lora_r for c in configs))


# -- the adapter that it begins from ---------------------------------------------------------------


def shaped(config: Config, adapter: Path | None) -> Config:
    """The config with the adapter's own rank, alpha and targets, and nothing else to begin from.
    InputError if it is no adapter."""
    config = replace(config, adapter="")
    if adapter is None:
        return config
    shape = adapters.read_config(adapter)
    return replace(
        config,
        lora_r=shape.rank,
        lora_alpha=shape.alpha,
        lora_target_modules=tuple(p for p in PROJECTIONS if p in shape.target_modules),
    )


def begun(config: Config, given: Collection[str] = ()) -> Config:
    """The config with the shape of the adapter that it begins from, if it names one: a PEFT folder,
    or a run for its last. InputError for an option of another value than the adapter has, if it was
    asked for: it is among the `given`, or not the default."""
    if not config.adapter:
        return config
    folder = Path(config.adapter)
    folder = last_adapter(folder) if run_of_adapter(folder) == folder else folder
    own, default = shaped(config, folder), {f.name: f.default for f in fields(config)}
    alike = lambda x: {*x} if isinstance(x, tuple) else x  # noqa: E731
    shape = {name: getattr(own, name) for name in SHAPE}
    odd = [
        f"{name}={asked!r}, and the adapter has {there!r}"
        for name, there in shape.items()
        if alike(asked := getattr(config, name)) != alike(there)
        and (name in given or alike(asked) != alike(default[name]))
    ]
    if odd:
        raise InputError(f"adapter={folder}: {'; '.join(odd)}: leave the option away")
    return replace(config, adapter=str(folder), **shape)
