"""Where completions come from: what every sampler must do, the one in JAX beside the trainer, and
the client of a vLLM server."""

from jgrpo.rollout.protocol import Completion, Progress, Sampler, prompt_seeds

__all__ = ["Completion", "Progress", "Sampler", "prompt_seeds"]
