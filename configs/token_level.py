"""rank1.py with the mean over all tokens instead of over completions (DAPO)."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), use_token_level_loss=True)
