"""The model card of a run's adapter, written from what the run left behind."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.estimators import mean_interval
from jgrpo.run.rundir import read_config, read_metrics

PATHS = ("run_dir", "base_dir", "vllm_url")
"""Options that say where the run was, not what: they stay out of a card."""


def model_card(model: str, base: str, run: Path | None, *, merged: bool) -> str:
    """Markdown with the hub's metadata: how to load `model` (its hub id); with a `run`, what it
    was trained on and how, its curve, and its last evaluation with intervals."""
    kind = "The whole model: base and adapter merged" if merged else "A LoRA adapter"
    parts = [
        _metadata(base, merged),
        f"# {model}",
        f"{kind}, trained from [{base}](https://huggingface.co/{base}) by GRPO against a "
        "verifiable reward with jgrpo.",
        _loading(model, base, merged),
    ]
    if run is not None:
        saved = read_config(run)
        parts += [_data(saved["config"]), _evaluation(run), _curve(run), _options(saved)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(base: str, merged: bool) -> str:
    relation, library = ("finetune", "transformers") if merged else ("adapter", "peft")
    return (
        f"---\nbase_model: {base}\nbase_model_relation: {relation}\nlibrary_name: {library}\n"
        "pipeline_tag: text-generation\ntags:\n- grpo\n- lora\n- jgrpo\n---"
    )


def _loading(model: str, base: str, merged: bool) -> str:
    if merged:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{model}")\n```\n\n'
            f"```bash\nvllm serve {model}\n```"
        )
    return (
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{model}")\n```\n\n'
        f"```bash\nvllm serve {base} --enable-lora --lora-modules grpo={model}\n```"
    )


def _data(options: Mapping[str, Any]) -> str:
    name, split = options["dataset_path"], options["dataset_split"]
    name = Path(name).name if Path(name).is_absolute() else name
    return (
        f"## Training\n\nProblems of `{name}`{f' ({split})' if split else ''}: "
        f"{options['n_grpo_steps']} steps of {options['n_prompts_per_step']} problems, "
        f"{options['group_size']} completions each, at most {options['max_tokens']} tokens."
    )


def _evaluation(run: Path) -> str:
    """Of eval.jsonl, if `jgrpo.evaluate` was run; accuracies with 95 % intervals over problems."""
    file = run / "eval.jsonl"
    if not file.is_file():
        return ""
    problems: dict[tuple, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    try:
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            policy = "base" if row["adapter"] is None else f"step {row['step']}"
            problems[policy, row["eval_set"] or "-"][row["index"]].append(row["correct"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error!r}); evaluate the run again") from None
    rows = []
    for (policy, name), scores in problems.items():
        n_samples = max(map(len, scores.values()))
        interval = mean_interval(np.array([np.mean(s) for s in scores.values()]))
        shown = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in interval))
        rows.append([policy, name, len(scores), n_samples, shown])
    titles = ["policy", "set", "problems", "completions each", "accuracy, % (95 % interval)"]
    return "## Evaluation\n\n" + _table(titles, rows)


def _curve(run: Path) -> str:
    rows = [row for row in read_metrics(run) if row.get("eval/accuracy") is not None]
    values = [[row["step"], f"{row['eval/accuracy']:.3f}"] for row in rows]
    titles = ["step", "accuracy on the evaluation problems"]
    return "## Curve\n\n" + _table(titles, values) if values else ""


def _options(saved: Mapping[str, Any]) -> str:
    """The options that differ from the defaults, and the versions."""
    default = Config()
    rows = []
    for name, value in saved["config"].items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in PATHS and value != getattr(default, name, None):
            if isinstance(value, str) and Path(value).is_absolute():
                value = Path(value).name
            rows.append([f"`{name}`", f"`{value}`"])
    versions = ", ".join(f"{name} {v}" for name, v in saved.get("versions", {}).items())
    table = _table(["option (others: jgrpo's defaults)", "value"], rows)
    return f"## Options\n\n{table}\n\nVersions: {versions}."


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
