"""Give an adapter away: python -m jgrpo.export ADAPTER [--merge OUT] [--push_to_hub ID].

Merged into its base as a Hugging Face checkpoint, or as it is; on the hub with a card that the run
wrote. The token is the one that huggingface_hub finds (HF_TOKEN, `hf auth login`).
"""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jgrpo.errors import InputError, RunError, exit_status
from jgrpo.policy.adapter import CONFIG_FILE, WEIGHTS_FILE, read_config
from jgrpo.run.rundir import last_adapter, run_of_adapter


@dataclass(frozen=True)
class Options:
    """Merge an adapter into its base, or put it (or the merge) on the hub."""

    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """PEFT folder, or a run folder for its last adapter."""
    merge: Path | None = None
    """New folder for base + adapter, a checkpoint that needs no PEFT."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the merged weights, rounded once from their float32 sum."""
    base: str = ""
    """The base model, hub id or folder, where it is not the one that the adapter names."""
    push_to_hub: str = ""
    """Hub id of a model repository (OWNER/NAME), made if there is none: the merge, where --merge is
    given, else the adapter, with a card from the run's own files."""
    private: bool = False
    """Of a repository that is made."""
    dry_run: bool = False
    """With --push_to_hub: show the files and the card, and send nothing."""


def export(options: Options) -> None:
    """Do what is asked, and say where it is."""
    run = run_of_adapter(options.adapter)
    adapter = last_adapter(options.adapter) if run == options.adapter else options.adapter
    read_config(adapter)
    base = options.base or named_base(adapter)
    if options.merge is None and not options.push_to_hub:
        raise InputError("nothing to do: give --merge OUT, --push_to_hub ID, or both")
    if options.push_to_hub and Path(base).exists():
        raise InputError(
            f"the adapter's base is the folder {base}, which nobody else has: give the base's hub "
            "id as --base"
        )
    if options.merge is not None:
        from jgrpo.policy.merge import merge

        merge(base, adapter, options.merge, options.dtype)
        print(f"merged: {options.merge}")
    if options.push_to_hub:
        push(options, files_of(adapter, base, options.merge), base, run)


def named_base(adapter: Path) -> str:
    """The base that an adapter's config names. InputError if it names none."""
    base = json.loads((adapter / CONFIG_FILE).read_text()).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{adapter / CONFIG_FILE} names no base model; give it as --base")
    return str(base)


def files_of(adapter: Path, base: str, merged: Path | None) -> dict[str, bytes | str]:
    """What goes to the hub, by name there: a file's path, or bytes. An adapter's config names the
    base as others know it."""
    if merged is not None:
        return {f.name: str(f) for f in sorted(merged.iterdir()) if f.is_file()}
    config = json.loads((adapter / CONFIG_FILE).read_text()) | {"base_model_name_or_path": base}
    weights = str(adapter / WEIGHTS_FILE)
    return {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS_FILE: weights}


def push(options: Options, files: dict[str, bytes | str], base: str, run: Path | None) -> None:
    """One commit with the files and the card. RunError if the hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from jgrpo.run.card import model_card

    name = options.push_to_hub
    card = model_card(name, base, run, merged=options.merge is not None)
    files = files | {"README.md": card.encode()}
    if options.dry_run:
        print(f"would send to {name}: {', '.join(sorted(files))}\n\n{card}")
        return
    adds = [CommitOperationAdd(path_in_repo=k, path_or_fileobj=v) for k, v in files.items()]
    message = f"Trained with jgrpo: {'base and adapter' if options.merge else 'adapter'}"
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True, private=options.private)
        done = api.create_commit(name, adds, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {name}: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise RunError(
            f"the hub did not take it: {type(error).__name__}: {first_line}. Log in with `hf auth "
            "login`, or set HF_TOKEN to a token that may write"
        ) from error
    print(f"on the hub: {done.commit_url}")


def main() -> None:
    options = tyro.cli(Options, prog="python -m jgrpo.export", use_underscores=True)
    with exit_status():
        export(options)


if __name__ == "__main__":
    main()
