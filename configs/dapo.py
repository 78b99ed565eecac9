"""rank1.py with DAPO: clip-higher, token level, dynamic sampling and the soft length penalty."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    use_clip=True,
    clip_eps=0.2,
    clip_eps_high=0.28,
    use_token_level_loss=True,
    use_dynamic_sampling=True,
    use_length_penalty=True,
)
