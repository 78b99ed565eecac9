"""python -m jgrpo.tiny FOLDER: the quick start's base model and problems, from nothing."""

from jgrpo.cli import tune_allocator
from jgrpo.errors import exit_status, stop_at_once

if __name__ == "__main__":
    stop_at_once()
    tune_allocator()
    with exit_status():
        from jgrpo.tiny.recipe import main

        main()
