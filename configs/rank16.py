"""rank1.py with an adapter of rank 16."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(load_config(Path(__file__).with_name("rank1.py")), lora_r=16)
