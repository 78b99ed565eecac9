"""Evaluate: python -m jgrpo.evaluate --config FILE [--adapter DIR] [--out FILE].

Greedy accuracy on the config's evaluation problems; the last line printed is one JSON object.
"""

from jgrpo.errors import InputError, exit_status, stop_at_once

if __name__ == "__main__":
    stop_at_once()
from jgrpo import cli

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Evaluate)

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from jgrpo.config import Config
from jgrpo.policy.adapter import load, read_config
from jgrpo.run.rundir import is_writable, json_line, write_whole
from jgrpo.run.session import (
    configure_jax,
    evaluate,
    open_grader,
    open_policy,
    open_problems,
    open_sampler,
)


def run(config: Config, adapter: Path | None, out: Path | None) -> dict[str, float]:
    """Evaluate the base, or the adapter in a PEFT folder, and print what came out."""
    configure_jax()
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if out is not None and (out.is_dir() or not is_writable(out.parent)):
        raise InputError(f"--out {out}: is a folder, or in one that cannot be written to")
    if adapter is not None:
        shape = read_config(adapter)
        config = replace(
            config,
            lora_r=shape.rank,
            lora_alpha=shape.alpha,
            lora_target_modules=shape.target_modules,
        )
    with ExitStack() as stack:
        problems = open_problems(config)
        grader = open_grader(config, stack)
        policy = open_policy(config, abstract=config.rollout == "vllm")
        if adapter is not None:
            load(adapter, policy.adapter)  # the server would take one that does not fit, silently
        sampler = open_sampler(config, policy, problems.stop_token_ids, "evaluate", alone=False)
        stack.callback(sampler.close)
        if adapter is not None:
            sampler.load(adapter)
        grader.self_test()
        n = len(problems.evaluation)
        with Progress(transient=True) as bars:
            task = bars.add_task(f"{n} problems", total=n)
            advance = lambda done, tokens: bars.advance(task, done)  # noqa: E731
            metrics, completions, grades = evaluate(sampler, grader, problems, advance)
    if out is not None:
        rows = zip(problems.evaluation, completions, grades.correct[:, 0], strict=True)
        lines = (
            {
                "problem": problem.problem,
                "completion": problems.text(completion),
                "gold": problem.gold,
                "correct": bool(correct),
                "finish_reason": completion.finish_reason,
            }
            for problem, completion, correct in rows
        )
        write_whole(out, "".join(map(json_line, lines)))
    print(json.dumps({"adapter": str(adapter) if adapter else None, **metrics}))
    return metrics


if __name__ == "__main__":
    with exit_status():
        run(COMMAND.options, COMMAND.adapter, COMMAND.out)
