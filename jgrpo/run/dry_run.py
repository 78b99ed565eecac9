"""`--dry_run`: reads all input but the weights, and says what training will take of the memory."""

from collections.abc import Sequence

from jgrpo.checks import without_effect
from jgrpo.config import Config
from jgrpo.errors import printable
from jgrpo.members import check_together
from jgrpo.rewards import load_functions
from jgrpo.run import memory
from jgrpo.run.difficulty import of_this_difficulty
from jgrpo.run.policy import begun, open_policies
from jgrpo.run.session import columns_of, configure_jax, open_problems


def dry_run(configs: Sequence[Config]) -> None:
    """Read all input but the weights, and print what training will take of the memory."""
    configure_jax()
    configs = [begun(config) for config in configs]
    check_together(configs)
    shared = configs[0]
    problems = of_this_difficulty(shared, open_problems(shared))
    for config in configs:
        load_functions(config.reward_function, columns_of(problems.train))
    policy = open_policies(configs, abstract=True)
    lengths = [len(problem.prompt_ids) for problem in problems.train]
    free = memory.free_memory()
    told = [memory.training_memory(configs, policy, lengths).table(free)]
    if shared.rollout == "jax":
        told.append(memory.of_sampling(configs, policy, free))
    warnings = dict.fromkeys(line for config in configs for line in without_effect(config))
    for line in (*problems.report, *warnings, *told):
        print(printable(line))
