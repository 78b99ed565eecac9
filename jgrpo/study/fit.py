"""How many runs of a study fit into the memory, by the figure of `train --dry_run`: how many
processes at a time, and how many runs side by side in each."""

import os
from collections.abc import Sequence

import jax

from jgrpo.config import Config
from jgrpo.run.device import free_memory
from jgrpo.run.difficulty import of_this_difficulty
from jgrpo.run.memory import training_memory
from jgrpo.run.policy import begun, open_policies
from jgrpo.run.session import configure_jax, open_problems

MOST_TOGETHER = 16
"""What is compiled for so many is shared among them; more would gain little, and are lost together
where a process is killed."""
MOST_PROCESSES = 8
"""Each imports and compiles for itself."""


def what_fits(
    alike: Sequence[Sequence[Config]], n_processes: int | None, together: int | None
) -> tuple[int, int, str]:
    """How many processes, how many of these runs side by side in each, and why. None: as many as
    are of use, by halves until what the training phases need at their peak is free; what is given
    stays. The runs of a group share what members must."""
    configure_jax()
    n = n_processes or _of_use(alike)
    wanted = most = min(together or MOST_TOGETHER, max(map(len, alike)))
    free, needed = free_memory(), 0
    for group in alike:
        configs = [begun(config) for config in group]
        problems = of_this_difficulty(configs[0], open_problems(configs[0]))
        lengths = [len(problem.prompt_ids) for problem in problems.train]
        while True:
            policy = open_policies(configs[:most], abstract=True)
            each = training_memory(configs[:most], policy, lengths).total
            if free is None or n * each <= free:
                break
            if together is None and most > 1:
                most //= 2
            elif n_processes is None and n > 1:
                n, most = n // 2, wanted
            else:
                break
        needed = max(needed, n * each)
    gib = lambda size: f"{size / 2**30:.3g} GiB"  # noqa: E731
    room = f" of {gib(free)} that are free" if free is not None else ""
    in_each = f" in each of {n} processes" if n > 1 else ""
    server = f"; serve --max_loras {most}" * (alike[0][0].rollout == "vllm" and most > 1)
    told = f"up to {most} runs side by side{in_each}: training takes {gib(needed)}{room}{server}"
    return n, most, told


def _of_use(alike: Sequence[Sequence[Config]]) -> int:
    """Processes: one has its GPU, or its server, for itself; small models leave a second core idle,
    so that on a CPU each core has one."""
    if jax.default_backend() != "cpu" or any(group[0].rollout == "vllm" for group in alike):
        return 1
    usable = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES, sum(map(len, alike)))
