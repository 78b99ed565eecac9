"""Export and hot load of an adapter of Qwen3-1.7B's shape, in seconds.

    python benchmarks/reload.py [--rank 1] [--repeats 5]

What a training step does with its adapter: write the PEFT folder, and have a real vLLM load it. The
server holds that shape with random weights in bfloat16 (vLLM's dummy load format). Last line: one
JSON document.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from sampler import ROOT, TINY_BASE, VllmSampler, vllm_server
from speed import QWEN3_1_7B
from transformers import AutoConfig, AutoTokenizer

from jgrpo.config import Config
from jgrpo.policy.adapter import AdapterConfig, save
from jgrpo.policy.lora import fresh_adapter
from jgrpo.run.policy import open_policy

MOST_S = 0.5


@dataclass
class Args:
    """Time the export and the hot load of an adapter."""

    rank: int = 1
    """Of the adapter."""
    repeats: int = 5
    """Adapters, after one that is not counted."""


def main() -> None:
    args = tyro.cli(Args)
    export, load = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoConfig.for_model(**QWEN3_1_7B).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(folder / "model")
        config = Config(
            model_id=str(folder / "model"), lora_r=args.rank, max_prompt_tokens=64, max_tokens=64,
            prompt_template=str(ROOT / "boxed.prompt"),
        )  # fmt: skip
        shape = AdapterConfig(config.lora_r, config.lora_alpha, config.lora_target_modules)
        adapter = fresh_adapter(open_policy(config, abstract=True).adapter, seed=0)
        fields = {"dtype": "bfloat16", "max_prompt_tokens": 64, "max_tokens": 64}
        with vllm_server(
            folder / "model", folder / "log", extra=("--load-format", "dummy"),
            timeout_s=600, lora_r=args.rank, **fields,
        ) as url:  # fmt: skip
            sampler = VllmSampler(
                [url], run_id="benchmark", max_tokens=64, max_model_len=128,
                vocab_size=2**31, stop_token_ids=[],
                timeout_s=600, start_command="",
            )  # fmt: skip
            for i in range(args.repeats + 1):
                start = time.perf_counter()
                save(adapter, folder / f"step_{i}", shape, "")
                saved = time.perf_counter()
                sampler.load(folder / f"step_{i}")
                export.append(saved - start)
                load.append(time.perf_counter() - saved)
    total = [e + x for e, x in zip(export[1:], load[1:], strict=True)]
    for label, seconds in (("export", export[1:]), ("load", load[1:]), ("both", total)):
        print(f"{label:7} {median(seconds):.3f} s (largest {max(seconds):.3f})")
    print(f"the goal of {MOST_S} s is {'met' if median(total) < MOST_S else 'missed'}")
    print(json.dumps({"rank": args.rank, "export_s": export, "load_s": load}))


if __name__ == "__main__":
    main()
