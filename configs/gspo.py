"""rank1.py with GSPO, one ratio a completion, and its clip (one update: no clip binds)."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    loss_type="gspo",
    use_clip=True,
    clip_eps=3e-4,
    clip_eps_high=4e-4,
)
