"""rank1.py with half of the reward from a process reward model."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")), use_prm=True, process_reward_weight=0.5
)
