"""Run folders written by hand, as a run would: for tests of what reads them."""

import json
from pathlib import Path

from jgrpo.config import Config
from jgrpo.run.rundir import json_line, jsonable, write_rollouts
from jgrpo.tiny.recipe import make_tokenizer

HOSTILE = (
    "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'> </script> <!-- "
    "\x1b[31mred\x1b[0m \N{RIGHT-TO-LEFT OVERRIDE}abc\N{POP DIRECTIONAL FORMATTING} "
    "\N{ZERO WIDTH SPACE}\r\x00 \ud800 \\boxed{<b>7</b>}"
)


def completion(problem: str, text: str, *, right: bool, advantage: float, **more) -> dict:
    """A line of a rollouts file; its tokens are those of the quick start's tokenizer, if that knows
    the text."""
    ids = make_tokenizer()(text, add_special_tokens=False).input_ids if text.isascii() else [1, 2]
    n = len(ids)
    return {
        "problem": problem, "prompt": f"{problem}\n", "completion": text, "prompt_ids": [1, 2],
        "token_ids": ids, "sampler_logprobs": [-0.5 * i for i in range(n)], "gold": "7",
        "reward": float(right), "reward_parts": {"outcome": float(right)}, "advantage": advantage,
        "finish_reason": "length", **more,
    }  # fmt: skip


def a_run(folder: Path, *, seed: int = 0, n_steps: int = 4, lora_r: int = 1, **metrics) -> Path:
    """A run of n_steps steps: 2 problems, 3 completions of each; one is right, one wrong and boxed,
    one has no box. Its base folder holds the quick start's tokenizer."""
    base = folder.parent / "base"
    if not base.is_dir():
        make_tokenizer().save_pretrained(base)
    folder.mkdir(parents=True)
    config = Config(model_id=str(base), dtype="float32", seed=seed, lora_r=lora_r,
                    n_grpo_steps=n_steps)  # fmt: skip
    content = {"config": jsonable(vars(config)), "seed": seed}
    (folder / "config.json").write_text(json.dumps(content))
    lines = [{"step": 0, "eval/accuracy": 0.25}]
    for step in range(1, n_steps + 1):
        lines.append({
            "step": step,
            "train/accuracy": 0.1 * step + 0.01 * seed, "train/reward_mean": 0.1 * step,
            "sampler/logprob_diff_mean": 1e-7, "train/zero_advantage_fraction": 0.5,
            "train/truncated_fraction": 0.0, "train/skipped_updates": 0.0, "reward/errors": 0.0,
            "reward/timeouts": 0.0, "time/step": 2.0, "time/generation": 1.0, "time/training": 0.5,
        } | metrics)  # fmt: skip
        rows = [
            row
            for n in (1, 2)
            for row in (
                completion(f"What is {n} + {7 - n}?", f"{n}+{7 - n}=7. \\boxed{{7}}",
                           right=True, advantage=1.0),
                completion(f"What is {n} + {7 - n}?", "\\boxed{8}", right=False, advantage=-0.5),
                completion(f"What is {n} + {7 - n}?", "7.", right=False, advantage=-0.25),
            )
        ]  # fmt: skip
        write_rollouts(folder, step, rows)
    (folder / "metrics.jsonl").write_text("".join(map(json_line, lines)))
    return folder
