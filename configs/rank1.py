"""The study's best design: rank 1, plain GRPO, no clip, no KL; Qwen3-1.7B on competition_math."""

from jgrpo.config import Config

config = Config(gradient_checkpointing=True)  # one card for this model and vLLM
