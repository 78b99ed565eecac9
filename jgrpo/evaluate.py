"""Evaluate: python -m jgrpo.evaluate --run RUN [--step K], or --config FILE [--adapter DIR].

Policies x sets of problems -> accuracies with intervals: a table on stderr, every completion in
eval.jsonl, and one JSON line on stdout.
"""

from jgrpo.errors import InputError, exit_status, printable, stop_at_once

if __name__ == "__main__":
    stop_at_once()
from jgrpo import cli
from jgrpo.run.without_torch import leave_out_torch, torch_again

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Evaluate)
        leave_out_torch([COMMAND.options])

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from jgrpo.prompts.problems import make_evaluation, overlap
from jgrpo.prompts.sets import read_set
from jgrpo.run.evaluation import evaluate_members
from jgrpo.run.results import Result, as_json, compare, draw_steps, table
from jgrpo.run.rundir import (
    adapter_of,
    is_writable,
    json_line,
    kept_adapters,
    run_of_adapter,
    write_whole,
)
from jgrpo.run.sampler import check_adapters, each_policy
from jgrpo.run.session import Problems, configure_jax, open_grader, open_problems


def run(command: cli.Evaluate) -> dict[str, Any]:
    """Evaluate every policy on every set, write and show what came out, and return its JSON."""
    configure_jax()
    config, console = command.options, Console(stderr=True, highlight=False)
    policies, outputs = policies_of(command), output_files(command)
    results = []
    with ExitStack() as stack:
        problems = open_problems(config)
        sets = open_sets(command, problems)
        for line in notes(sets, problems):
            console.print(printable(line), markup=False, soft_wrap=True)
        check_adapters(config, policies)
        grader = open_grader(config, stack)
        grader.self_test()
        n_completions = len(policies) * config.eval_n_samples * sum(map(n_asked, sets.values()))
        bars = stack.enter_context(Progress(console=console, transient=True))
        task = bars.add_task(f"{n_completions} completions", total=n_completions)
        advance = lambda done, tokens: bars.advance(task, done)  # noqa: E731
        for part, sampler in each_policy(config, policies, problems.stop_token_ids):
            for name, asked in sets.items():
                members = range(len(part))
                found = evaluate_members(
                    [config] * len(part), members, sampler, grader, asked, advance
                )
                results += [Result(a, name, e) for a, e in zip(part, found, strict=True)]
    results.sort(key=lambda result: policies.index(result.adapter))
    comparisons = compare(results, reference_of(command)) if command.against else []
    for out, run in outputs.items():
        own = [r for r in results if run in (None, run_of_adapter(r.adapter))
               or (command.against and r.adapter == reference_of(command))]  # fmt: skip
        write_whole(out, "".join(json_line(line) for r in own for line in r.lines()))
        if command.all_steps:
            draw_steps(own).savefig(out.with_name("eval_curve.png"))
    console.print(table(results))
    for comparison in comparisons:
        console.print(printable(comparison.text()), markup=False, soft_wrap=True)
    figures = as_json(results, comparisons)
    print(json.dumps(figures))
    return figures


def reference_of(command: cli.Evaluate) -> Path | None:
    """What --against names: an adapter, or None for the base."""
    return None if str(command.against) == "base" else command.against


def policies_of(command: cli.Evaluate) -> list[Path | None]:
    """The adapters to evaluate (None: the base), without repeats. InputError if --against is the
    only one of them."""
    policies: list[Path | None] = [command.adapter]
    if command.all_steps:
        policies = [a for run in command.run for a in kept_adapters(run).values()]
    elif command.run:
        policies = [adapter_of(run, command.step) for run in command.run]
    if command.against is not None:
        policies = [reference_of(command), *policies]
        if len(set(policies)) == 1:
            raise InputError(f"--against {command.against}: is what is evaluated; give another")
    return list(dict.fromkeys(policies))


def output_files(command: cli.Evaluate) -> dict[Path, Path | None]:
    """Where the completions go: the file, and the run whose it is (None: all that are evaluated).
    InputError if one cannot be written."""
    homes = command.run or [run for run in [run_of_adapter(command.adapter)] if run]
    files: dict[Path, Path | None] = {run / "eval.jsonl": run for run in homes}
    files = {command.out: None} if command.out else files
    for out in files:
        if not out.parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {out.parent}")
        if out.is_dir() or not is_writable(out.parent):
            raise InputError(f"--out {out}: is a folder, or in one that cannot be written to")
    return files


def open_sets(command: cli.Evaluate, problems: Problems) -> dict[str, Problems]:
    """The named sets, each as the evaluation problems of a copy of `problems`; without any, the
    config's own under the name ""."""
    if not command.eval_set:
        return {"": problems}
    sets, config = {}, command.options
    for name in dict.fromkeys(command.eval_set):
        rows, line = read_set(name, command.eval_set_folder)
        evaluation, report = make_evaluation(
            problems.tokenizer,
            rows,
            prompt_template=config.prompt_template,
            enable_thinking=config.enable_thinking,
            max_prompt_tokens=config.max_prompt_tokens,
            problem_column=config.problem_column,
            answer_column=config.answer_column,
            system_prompt=config.system_prompt,
        )
        sets[name] = replace(problems, evaluation=evaluation, report=[line, *report])
    return sets


def n_asked(problems: Problems) -> int:
    return len(problems.evaluation)


def notes(sets: dict[str, Problems], problems: Problems) -> list[str]:
    """What a reader must know of the sets: whence, what was left out, what was trained on."""
    lines = []
    for name, asked in sets.items():
        common = overlap(asked.evaluation, problems.train)
        lines += asked.report if name else []
        if common:
            lines.append(
                f"{name or 'evaluation'}: {common} of {n_asked(asked)} problems are training "
                "problems too: what is learned by heart counts as solved"
            )
    return lines


if __name__ == "__main__":
    torch_again()
    with exit_status():
        run(COMMAND)
        sys.stdout.flush()
