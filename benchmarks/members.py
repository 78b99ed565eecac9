"""Eight members' training phase beside eight lone ones, one after another: time and peak memory.

    python benchmarks/members.py [--shape 135m] [--members 8] [--repeats 3]

Both sides train the same rollouts, a member's each, with the same micro-batch. Each is a process of
its own and works when it is its turn; the ratio is of neighbouring turns, the first turn
(compilation) is left out. Processor time says more where the machine is shared. Memory is what a
turn takes beside what was resident before it, of one lone member and of all side by side. Last
line: one JSON document. Linux only.
"""

import dataclasses
import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro
from speed import SHAPES, config_of, make_lines, random_model
from speed import Args as SpeedArgs
from speed_sides import forget_peak, resident_bytes


@dataclass
class Args:
    """Time the training phase of several members, together and one after another."""

    shape: Literal["tiny", "135m"] = "135m"
    """As in speed.py."""
    members: int = 8
    lora_r: int = 1
    repeats: int = 3
    """Timed turns of each side, after the first."""
    lengths: Literal["full", "realistic"] = "realistic"
    """As in speed.py."""


def work(args: Args, together: bool, turns, answers) -> None:
    """For each turn that is asked for: seconds, of the clock and of the processor, norms of the
    members, and peak memory."""
    import numpy as np

    from jgrpo.policy.lora import stacked_up
    from jgrpo.run.session import configure_jax
    from jgrpo.study.compare import saved_rows
    from jgrpo.update.learner import Learner

    configure_jax()
    shape = SHAPES[args.shape]
    configs, rows = [], {}
    for e in range(args.members):
        of_member = SpeedArgs(shape=args.shape, lengths=args.lengths, seed=e)
        config = config_of(of_member, shape, Path())
        vocab_size = (shape.model or {"vocab_size": 19})["vocab_size"]
        configs.append(dataclasses.replace(config, lora_r=args.lora_r, seed=e))
        rows[e] = saved_rows(config, make_lines(of_member, config, vocab_size))
    graph, adapter, base = random_model(configs[0], shape)
    sides = [[*range(args.members)]] if together else [[e] for e in range(args.members)]
    learners = [
        (Learner([configs[e] for e in side], graph, stacked_up([adapter] * len(side)), base), side)
        for side in sides
    ]
    if not together:  # the programs are the same for all: each its own Update would compile again
        for learner, _ in learners[1:]:
            learner.update = learners[0][0].update
    answers.put(None)
    while turns.get():
        forget_peak()
        before, _ = resident_bytes()
        start, norms = [time.perf_counter(), time.process_time()], []
        for learner, side in learners:
            found = learner.learn({i: rows[e] for i, e in enumerate(side)})
            norms += [found[i]["train/grad_norm"] for i in range(len(side))]
        now = time.perf_counter(), time.process_time()
        seconds = [b - a for a, b in zip(start, now, strict=True)]
        answers.put((seconds, np.array(norms), resident_bytes()[1] - before))


def main(args: Args) -> None:
    context = multiprocessing.get_context("spawn")
    sides = {}
    for together in (False, True):
        turns, answers = context.Queue(), context.Queue()
        process = context.Process(target=work, args=(args, together, turns, answers), daemon=True)
        process.start()
        answers.get()
        sides[together] = turns, answers, process
    found: dict[bool, list] = {False: [], True: []}
    for turn in range(args.repeats + 1):
        for together, (turns, answers, _) in sides.items():
            turns.put(1)
            found[together].append(answers.get())
        (alone, lone, _), (company, both, _) = found[False][-1], found[True][-1]
        print(f"turn {turn}: alone {alone[0]:.2f} s ({alone[1]:.2f} s of processor time), together "
              f"{company[0]:.2f} s ({company[1]:.2f} s), {company[0] / alone[0]:.3f} "
              f"({company[1] / alone[1]:.3f}); norms differ by {abs(both / lone - 1).max():.1e}",
              flush=True)  # fmt: skip
    for turns, _, process in sides.values():
        turns.put(None)
        process.join()
    pairs = list(zip(found[False][1:], found[True][1:], strict=True))
    clock, processor = (median(b[0][i] / a[0][i] for a, b in pairs) for i in range(2))
    memory = median(b[2] for _, b in pairs) / median(a[2] for a, _ in pairs)
    print(f"{args.members} members of rank {args.lora_r}: {clock:.3f} x the lone phases' time,")
    print(f"{processor:.3f} x their processor time, {memory:.2f} x a lone turn's memory")
    print(json.dumps({"time": clock, "processor_time": processor, "memory": memory,
                      "seconds": [[a[0], b[0]] for a, b in pairs]}))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
