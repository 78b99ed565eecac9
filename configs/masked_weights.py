"""rank1.py with importance weights a sequence, left out above the cap."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    use_importance_weights=True,
    importance_weight_mode="sequence_mask",
)
