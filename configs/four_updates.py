"""rank1.py with four optimizer updates a rollout, so that ratios leave 1."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), updates_per_epoch=4)
