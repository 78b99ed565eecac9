"""rank1.py with PPO's clip (one update a rollout: no effect)."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), use_clip=True, clip_eps=0.2)
