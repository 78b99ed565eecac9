"""rank1.py with the study's KL, to the old policy (one update a rollout: no effect)."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), use_kl_penalty=True, beta=0.04)
