"""rank1.py with clip and its second bound, where the advantage is negative; four updates."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    use_clip=True,
    clip_delta=3.0,
    updates_per_epoch=4,
)
