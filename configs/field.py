"""What the field uses today where the study differs (docs/recipes.md); the rest is rank1.py's."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = replace(
    load_config(Path(__file__).with_name("rank1.py")),
    lora_alpha=2,  # lr x alpha / r = 8e-5; the study's 9e-5 x 32 / 1 = 2.9e-3
    lr=4e-5,
    use_std_norm=False,  # Dr. GRPO
    use_token_level_loss=True,  # DAPO
    use_importance_weights=True,  # truncated at 2; logits leave the head in float32 anyway
)
