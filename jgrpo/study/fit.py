"""How many runs of a study fit side by side into the memory, by the figure of `train --dry_run`."""

from collections.abc import Sequence

from jgrpo.config import Config
from jgrpo.run.device import free_memory
from jgrpo.run.difficulty import of_this_difficulty
from jgrpo.run.memory import training_memory
from jgrpo.run.policy import begun, open_policies
from jgrpo.run.session import configure_jax, open_problems

MOST_TOGETHER = 16
"""What is compiled for so many is shared among them; more would gain little, and are lost together
where a process is killed."""


def most_that_fit(alike: Sequence[Sequence[Config]], n_processes: int) -> tuple[int, str]:
    """How many of these, which share what members must, may be trained side by side in each of so
    many processes, and why: by halves, until what the training phases need at their peak is free.
    """
    configure_jax()
    free, most, needed = free_memory(), max(min(MOST_TOGETHER, len(group)) for group in alike), 0
    for group in alike:
        configs = [begun(config) for config in group]
        problems = of_this_difficulty(configs[0], open_problems(configs[0]))
        lengths = [len(problem.prompt_ids) for problem in problems.train]
        while True:
            policy = open_policies(configs[:most], abstract=True)
            total = n_processes * training_memory(configs[:most], policy, lengths).total
            if most == 1 or free is None or total <= free:
                break
            most //= 2
        needed = max(needed, total)
    gib = lambda size: f"{size / 2**30:.3g} GiB"  # noqa: E731
    room = f" of {gib(free)} that are free" if free is not None else ""
    in_each = f" in each of {n_processes} processes" if n_processes > 1 else ""
    server = f"; serve --max_loras {most}" * (alike[0][0].rollout == "vllm" and most > 1)
    told = f"up to {most} runs side by side{in_each}: training takes {gib(needed)}{room}{server}"
    return most, told
