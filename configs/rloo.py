"""rank1.py with REINFORCE leave-one-out: a completion as one action."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    loss_type="rloo",
    use_leave_one_out=True,
    use_std_norm=False,
)
