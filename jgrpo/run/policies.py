"""Several policies, one after another: the base and adapters of any rank, each in a sampler."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from jgrpo.config import Config
from jgrpo.policy.adapter import load
from jgrpo.rollout.protocol import Sampler
from jgrpo.run.session import open_policy, open_sampler, shaped


def check_adapters(config: Config, adapters: Sequence[Path | None]) -> None:
    """InputError if one does not fit the model: a server would take it, and change nothing."""
    for adapter in adapters:
        if adapter is not None:
            load(adapter, open_policy(shaped(config, adapter), abstract=True).adapter)


def each_policy(
    config: Config, adapters: Sequence[Path | None], stops: Sequence[int]
) -> Iterator[tuple[Path | None, Sampler]]:
    """Each adapter (None: the base), and a sampler that samples from it until the next is taken.
    The base comes first; adapters of one shape that follow each other share a sampler."""
    ordered = sorted(adapters, key=lambda adapter: adapter is not None)
    first = next((a for a in ordered if a is not None), None)
    for own, group in groupby(ordered, lambda adapter: shaped(config, adapter or first)):
        policy = open_policy(own, abstract=own.rollout == "vllm")
        sampler = open_sampler(own, policy, stops, "evaluate", alone=False)
        try:
            for adapter in group:
                if adapter is not None:
                    sampler.load(adapter)
                yield adapter, sampler
        finally:
            sampler.close()
