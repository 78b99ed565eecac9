"""rank1.py with the soft length penalty in the reward (DAPO)."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), use_length_penalty=True)
