"""The commands, as `jgrpo COMMAND ...` or `python -m jgrpo COMMAND ...`."""

import difflib
import runpy
import sys

from jgrpo.errors import exit_status, stop_at_once

COMMANDS = {
    "train": "train a LoRA adapter by GRPO, or go on with a run (--resume)",
    "evaluate": "accuracy of the base model, an adapter, or a run",
    "filter": "pass rates of the training problems, for train --pass_rate",
    "serve": "start vLLM with exactly the options that a config needs",
    "runs": "a table of runs: how far, how good, what differs",
    "plot": "learning curves of runs as a picture",
    "view": "a page to read runs on: curves, completions, health",
    "show": "completions of a step in the terminal",
    "export": "an adapter merged into its base, or on the hub with a card",
    "replay": "compute a logged step again, and compare",
    "ablate": "loss variants on the same completions, or variants x seeds as runs",
    "tiny": "make the quick start's model and problems from nothing",
}


def usage() -> str:
    """What is printed without a command: one line a command."""
    lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jgrpo COMMAND [OPTIONS]    (or python -m jgrpo.COMMAND [OPTIONS])",
            "",
            *lines,
            "",
            "Each has its own --help. Start here, without a GPU, a server or a download:",
            "  jgrpo train --config tiny",
        ]
    )


def main() -> None:
    """Run the command that the first word names, as `python -m jgrpo.COMMAND` does."""
    stop_at_once()
    name = sys.argv[1] if sys.argv[1:] else ""
    if name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"jgrpo.{name}", run_name="__main__", alter_sys=True)
        return
    if name in ("", "-h", "--help"):
        with exit_status():
            print(usage(), flush=True)
        return
    near = difflib.get_close_matches(name, COMMANDS, 1)
    problem = f"error: {name!r} is no command" + (f"; did you mean {near[0]}?" if near else "")
    print(f"{problem}\n\n{usage()}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
