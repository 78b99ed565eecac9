"""rank1.py with DPPO, bounded by how far a probability moves; four updates a rollout."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    loss_type="dppo",
    updates_per_epoch=4,
)
