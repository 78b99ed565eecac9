"""rank1.py with a KL penalty to the base model (k3)."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")), use_kl_penalty=True, beta=0.04, kl_to="base"
)
