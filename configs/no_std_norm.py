"""rank1.py with advantages without the division by the group's standard deviation."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), use_std_norm=False)
