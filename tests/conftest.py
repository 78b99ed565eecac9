"""What several tests share: tiny checkpoints whose weights are large enough that errors show, the
same models in PyTorch (transformers, PEFT), and a ragged rollout.

Initial weights of 0.02 would make every layer nearly the identity; here each linear layer keeps the
variance of its input, and norm weights, biases and B are far from 1, 0 and 0.
"""

import functools
import gc
import os
import runpy
import signal
import sys

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # no test needs the hub; without it one is asked for long
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator's float32 matmul is not float32
# Most of a tiny model's time is compilation: without LLVM's optimizations, with XLA's older
# emitters of fusions, and not cut up for several cores (other workers have them), a third.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
# Of what a test compiles, few other tests compile the same, and writing it down took a sixth of the
# time. `shared_compilation_cache` is for tests that start several processes of one config.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

from collections import Counter
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_run import write_base, write_problems
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import jgrpo
from jgrpo.answers.grader import Grader
from jgrpo.policy.batch import MicroBatch, Rows, Shape, _fill, _pack, bucket
from jgrpo.policy.lora import LoRAParam, nth, split, stacked_up
from jgrpo.rollout import embedded
from jgrpo.run import record, session
from jgrpo.update import programs, step
from jgrpo.update.learner import Learner
from jgrpo.update.step import Update

OWN_FUSIONS = os.environ["XLA_FLAGS"].replace(
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters", ""
)
"""XLA_FLAGS of a process whose programs are fused as a user's are: with the older emitters, two of
them that differ in nothing that matters may end some bits apart."""


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every test, the long ones and vLLM's too")


def is_short(config) -> bool:
    """A bare pytest: without --all, -m or a test's name, all but the long tests and vLLM's."""
    named = any("::" in word for word in config.args)
    return not (config.getoption("--all") or config.getoption("-m") or named)


def pytest_collection_modifyitems(config, items):
    """Files whose tests are mostly long come first: no worker is left with one at the end."""
    is_long = lambda item: any(map(item.get_closest_marker, ("slow", "vllm")))  # noqa: E731
    long = [item for item in items if is_long(item)]
    if is_short(config):
        items[:] = [item for item in items if not is_long(item)]
        config.hook.pytest_deselected(items=long)
    else:
        n_long, n = (Counter(item.path for item in some) for some in (long, items))
        items.sort(key=lambda item: -n_long[item.path] / n[item.path])


def pytest_terminal_summary(terminalreporter, config):
    if is_short(config):
        terminalreporter.write_line("the long tests, and vLLM's, were left out: pytest --all")


# At 700, a tenth of the time that JAX traces is the collector's.
gc.set_threshold(50_000)

# A shell's background jobs ignore Ctrl-C, and so would all that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# With 64 positions and frequencies from 1 down to 1/3000, the fastest are kept (more than 4 turns),
# the slowest are stretched (less than 1 turn), and two lie between.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# With a head width of 16 and theta 100, pair 0 turns 41 times in 256 positions and pair 6 once:
# all three ranges of YaRN occur.
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e2,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
KINDS = {
    # Qwen3 with a head width of 16, although 32 / 4 = 8.
    "qwen3-tied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"head_dim": 16, "tie_word_embeddings": False}),
    "llama3-rope": (
        LlamaConfig,
        {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
    ),
}
KINDS |= {
    name: (Qwen3Config, {"head_dim": 16, "rope_parameters": YARN_ROPE | own})
    for name, own in {
        "yarn": {},
        "yarn-given-factor": {"attention_factor": 0.8, "factor": 8.0},
        "yarn-mscale": {"mscale": 2.0, "mscale_all_dim": 0.5},
        "yarn-betas": {"beta_fast": 8, "beta_slow": 2, "truncate": False},
    }.items()
}
PROMPTS = [[5, 9, 11], [7, 3, 2, 8, 13, 1, 30], [4]]


def hf_config(kind: str, **changes):
    make, own = KINDS[kind]
    return make(**({**SHAPE, "rope_parameters": ROPE} | own | changes))


def write_checkpoint(folder: Path, config, *, dtype=torch.float32, max_shard_size="5GB") -> Path:
    """A checkpoint of random weights, made and written by transformers."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    logit_std = 2.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
                weight.uniform_(low, high, generator=generator)
            else:
                std = logit_std if "embed" in name or "lm_head" in name else 1.0
                weight.normal_(0, std * weight.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(kind, **changes of the config) -> folder, float32; made once a session."""
    made: dict[tuple, Path] = {}

    def get(kind: str, **changes) -> Path:
        key = (kind, *sorted(changes.items()))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp(kind), hf_config(kind, **changes))
        return made[key]

    return get


@pytest.fixture(scope="session")
def qwen3_600m(tmp_path_factory) -> Path:
    """Random bfloat16 weights in the shape of Qwen3-0.6B: 1.2 GB."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return write_checkpoint(tmp_path_factory.mktemp("qwen3"), config, dtype=torch.bfloat16)


def torch_model(folder: Path, dtype=torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def torch_logits(model: torch.nn.Module, ids) -> np.ndarray:
    """float32 [N, T, V]"""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.float().numpy()


def random_ids(*shape: int, vocab_size: int = SHAPE["vocab_size"], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=shape, dtype=np.int32)


def with_random_b(adapter: nnx.State, seed: int = 1) -> nnx.State:
    """The adapter with B far from zero, so that alpha, rank and every target show."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1] != "lora_B":
            return leaf
        return leaf.replace(jnp.asarray(rng.normal(0, 0.05, leaf.shape), jnp.float32))

    return nnx.from_flat_state((p, fill(p, leaf)) for p, leaf in nnx.to_flat_state(adapter))


def adapted(folder: Path, rank: int, alpha: float = 32):
    """Graph, adapter with non-zero B, and base of the model in a folder."""
    model = jgrpo.load_model(str(folder), lora_r=rank, lora_alpha=alpha)
    graph, adapter, base = split(model)
    return graph, with_random_b(adapter), base


def as_main(module: str, *arguments: str) -> None:
    """Run a command of the package as `python -m` does, in this process, whose handlers of Ctrl-C
    and SIGTERM come back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, f"jgrpo.{module}", raising=False)
        try:
            runpy.run_module(f"jgrpo.{module}", run_name="__main__")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def merged(graph, adapter, base):
    model = nnx.merge(graph, adapter, base)
    assert nnx.state(model, LoRAParam)
    return model


class OneMember:
    """An Update of one member, without the axis that counts members."""

    def __init__(self, update: Update, lr: float):
        self.update, self.lr = update, lr

    def init(self, adapter):
        return nth(self.update.init(stacked_up([adapter])), 0)

    def __call__(self, adapter, state, base, batches, denominator, old=None, ref=None):
        both = stacked_up([adapter]), stacked_up([state])
        given = np.full(1, denominator, np.float32), np.full((1, 1), self.lr, np.float32)
        *new, metrics, logprobs = self.update(*both, base, batches, *given, old, ref)
        return *nth(new, 0), nth(metrics, 0), logprobs

    def __getattr__(self, name):
        return getattr(self.update, name)


class OneLearner(Learner):
    """A Learner of one member, without the axis that counts members."""

    def __init__(self, config, graph, adapter, base):
        super().__init__([config], graph, stacked_up([adapter]), base)

    def learn(self, rows):
        return super().learn({0: rows})[0]


def in_one_batch(rows: Rows) -> MicroBatch:
    """The whole rollout as a single micro-batch, however much it would save to cut it."""
    groups = [[*g] for _, g in groupby(range(len(rows.prompts)), lambda i: tuple(rows.prompts[i]))]
    width = bucket(max(map(len, rows.completions)))
    packed = [_pack(rows, group, width) for group in groups]
    prompt_width = bucket(max(map(len, rows.prompts)))
    sizes = len(groups), prompt_width, sum(map(len, packed)), width
    n_slots = sizes[0] * sizes[1] + sizes[2] * sizes[3]
    shape = Shape(*sizes, max(map(len, groups)), n_slots)
    return _fill(rows, shape, packed)


@pytest.fixture
def rows() -> Rows:
    """Five ragged completions of three prompts; the fourth has advantage zero. Each ends with its
    own end token, 66, which occurs nowhere else."""
    prompts = [PROMPTS[i] for i in (0, 0, 1, 1, 2)]
    completions = [[20, 21, 22, 66], [33, 66], [12, 17, 19, 23, 29, 31, 66], [2, 66], [40, 3, 66]]
    advantages = np.array([0.7, -0.7, 1.3, 0.0, -0.9], np.float32)
    logprobs = [[-1.0] * len(c) for c in completions]
    return Rows(prompts, completions, logprobs, advantages)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a base and problems to train on (tiny_run.py), a module's own."""
    folder = tmp_path_factory.mktemp("root")
    write_base(folder / "base")
    write_problems(folder)
    return folder


@pytest.fixture(scope="module")
def shared_compilation_cache(tmp_path_factory):
    """For the processes that tests start: what one compiles, the next ones load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "xla"))
        yield


@pytest.fixture(scope="session", autouse=True)
def kept_grader():
    """The runs of a process grade with the same workers: each would import sympy again."""

    opened: list[Grader] = []

    class Kept(Grader):
        def __enter__(self) -> Grader:
            opened.append(self)
            return self

        def __exit__(self, *_: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "Grader", functools.cache(Kept))
        yield
    for grader in opened:
        grader.close()


@pytest.fixture(scope="session", autouse=True)
def kept_picture():
    """The runs of a process end with the picture of the first: to draw one takes longer than a step
    of theirs (run/test_curves.py is of what is drawn)."""
    real, first = record.save_curves, []

    def save_curves(run_dir: Path, file: Path) -> None:
        if not first:
            real(run_dir, file)
            first.append(file.read_bytes())
        file.write_bytes(first[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "save_curves", save_curves)
        yield


# All that a process has compiled, not the last few: the next test has use for some.
embedded._programs = functools.cache(embedded._programs.__wrapped__)
step.shared = functools.cache(programs.shared.__wrapped__)
MOST_RESIDENT_BYTES = 2 * 1024**3


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are most of a worker's memory. They stay while there is room."""
    yield
    if resident_bytes() > MOST_RESIDENT_BYTES:
        embedded._programs.cache_clear()
        step.shared.cache_clear()
        jax.clear_caches()


def resident_bytes() -> float:
    """This process's memory; without end where the system does not say (Linux does)."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return float("inf")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
