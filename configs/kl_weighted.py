"""rank1.py with the KL to the base weighed by the ratio; four updates a rollout."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    use_kl_penalty=True,
    kl_to="base",
    use_weighted_kl=True,
    updates_per_epoch=4,
)
