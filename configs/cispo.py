"""rank1.py with CISPO, the capped ratio as a weight (one update a rollout: no cap binds)."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), loss_type="cispo")
