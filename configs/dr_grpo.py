"""rank1.py with Dr. GRPO: no std, no lengths."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")), loss_type="dr_grpo", use_std_norm=False
)
