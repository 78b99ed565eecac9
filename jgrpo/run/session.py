"""What a config names, opened in the order in which bad input shows first; for `train` and
`evaluate` alike."""

import gc
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from transformers import PreTrainedTokenizerBase

from jgrpo.answers.grader import Grader
from jgrpo.config import PROJECTIONS, Config
from jgrpo.errors import InputError, printable, short
from jgrpo.members import check_together
from jgrpo.policy import adapter as adapters
from jgrpo.policy.lora import fresh_adapter, nth, rank_of, split, stacked_up, with_rank
from jgrpo.policy.mesh import lies, make_mesh, of_this_process
from jgrpo.policy.weights import (
    abstract_model,
    load_model,
    model_config,
    model_folder,
    read_hf_config,
    weights_fingerprint,
)
from jgrpo.prompts.problems import Problem, load_problems, load_template
from jgrpo.prompts.tokenizer import (
    load_tokenizer,
    refuse_ids_beyond,
    stop_token_ids,
    told_of_stops,
)
from jgrpo.rollout.embedded import JaxSampler, rows_that_fit
from jgrpo.rollout.protocol import Completion, Sampler
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.device import free_memory
from jgrpo.run.difficulty import of_this_difficulty
from jgrpo.run.hosts import told
from jgrpo.run.rundir import date_of, last_adapter, run_of_adapter
from jgrpo.run.scoring import Scorers, open_scorers
from jgrpo.run.trackers import check_installed

log = logging.getLogger(__name__)
SHAPE = ("lora_r", "lora_alpha", "lora_target_modules")
"""Options that an adapter brings with it."""


@dataclass(frozen=True)
class Problems:
    """The tokenizer, and what is asked."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    train: list[Problem]
    evaluation: list[Problem]
    report: list[str]
    templates: tuple[str, ...] = ()
    """The sources of what renders the problems."""
    date: datetime | None = None
    """What a template takes for now."""

    @property
    def fingerprint(self) -> str:
        """Of all that is asked, and of the answers that it is graded by; not of what the templates
        make of it, which may hold the date."""
        asked = [[p.problem, p.gold] for p in (*self.train, *self.evaluation)]
        whole = json.dumps([asked, self.templates, self.stop_token_ids])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def text(self, completion: Completion) -> str:
        """A completion as text, without its end token. Special tokens within it stay: leaving them
        out would join what they part, and `\\boxed{1<|box_end|>2}` would count as 12."""
        n_tokens = len(completion.token_ids) - (completion.finish_reason == "stop")
        return str(self.tokenizer.decode(completion.token_ids[:n_tokens]))


@dataclass(frozen=True)
class Policy:
    """The model, split into structure, adapter and frozen base. The adapter is one, or those of E
    members, [E, ...] (`scales` as in `lora.side_by_side`)."""

    graph: nnx.GraphDef
    adapter: nnx.State
    base: nnx.State
    scales: tuple[float, ...] = (1.0,)

    def alone(self, config: Config) -> "Policy":
        """With what this process holds of it."""
        return replace(self, base=of_this_process(make_mesh(config.fsdp), self.base))


@dataclass(frozen=True)
class Session:
    """What the members' configs name, opened: all that the runs read."""

    configs: tuple[Config, ...]
    problems: Problems
    policy: Policy
    grader: Grader
    scorers: tuple[Scorers, ...]

    @property
    def shared(self) -> Config:
        """For the options that all members have alike."""
        return self.configs[0]

    def about(self, e: int) -> str:
        """A member in a line: its base, its adapter, the device."""
        c, policy = self.configs[e], self.policy
        origin = f", begun from {short(c.adapter)}," if c.adapter else ""
        adapter = with_rank(nth(policy.adapter, e), c.lora_r)
        n_base, n = (sum(x.size for x in jax.tree.leaves(x)) for x in (policy.base, adapter))
        return (
            f"{short(c.model_id)}: {n_base:,} parameters ({c.dtype}); rank-{c.lora_r} adapter: "
            f"{n:,} ({n / n_base:.2%}){origin} on {jax.devices()[0].device_kind}"
        )


def open_session(
    configs: Sequence[Config], stack: ExitStack, resume: Path | None = None
) -> Session:
    """Everything but the sampler; what is cheap to find wrong first. InputError says what is. Runs
    that are resumed ask what they asked, with the date of their start where a template writes one.
    """
    check_together(configs)
    make_mesh(configs[0].fsdp)  # or says why not
    for config in configs:
        check_installed(config.report_to)
    shared = configs[0]
    problems = of_this_difficulty(
        shared, open_problems(shared, date_of(resume) if resume else None)
    )
    grader = open_grader(shared, stack)
    scorers = tuple(open_scorers(config, columns_of(problems.train)) for config in configs)
    with told("open"):
        policy = open_policies(configs)
    return Session(tuple(configs), problems, policy, grader, scorers)


def configure_jax() -> None:
    """Keep compiled programs on disk (JAX_COMPILATION_CACHE_DIR, else ~/.cache/jgrpo/xla); let
    float32 products be float32 on a GPU too (JAX's default there is TF32; bfloat16 is as it was)
    and float32 alone, whatever JAX_ENABLE_X64 says; and let Python's collector run less often, in
    the whole process. InputError if JAX cannot open the device that it is told to.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_enable_x64", False)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    default = os.path.join(caches, "jgrpo", "xla")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", default)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    gc.set_threshold(50_000)  # at 700, a tenth of the time that JAX traces is the collector's
    open_device()


def open_device() -> None:
    """InputError if there is no device as JAX_PLATFORMS names it."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter: an NVIDIA plugin without a GPU
        wanted = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise InputError(
            f"JAX_PLATFORMS={wanted}: JAX finds no such device ({reason}); "
            "unset it to take what there is, or JAX_PLATFORMS=cpu; a GPU needs jax[cuda13] and "
            "its driver"
        ) from error


def open_problems(config: Config, date: datetime | None = None) -> Problems:
    """Tokenizer and problems; the model's config is read too, so that all bad input shows. Chat
    templates that write the date write `date`, else today's."""
    date = date or datetime.now()
    folder = str(model_folder(config.model_id))
    vocab_size = model_config(Path(folder)).vocab_size
    hf = read_hf_config(Path(folder))
    n_positions, rope = hf.max_position_embeddings, hf.rope_parameters
    if rope["rope_type"] == "yarn":  # Qwen3's card leaves max_position_embeddings as it was
        reach = int(rope["factor"] * rope["original_max_position_embeddings"])
        n_positions = max(n_positions, reach)
    if config.max_model_len > n_positions:
        raise InputError(
            f"max_prompt_tokens={config.max_prompt_tokens} and max_tokens={config.max_tokens} are "
            f"more than the model's max_position_embeddings={n_positions}: lower one of them"
        )
    tokenizer = load_tokenizer(folder)
    train, evaluation, report = load_problems(
        tokenizer,
        dataset_path=config.dataset_path,
        dataset_split=config.dataset_split,
        eval_dataset_path=config.eval_dataset_path,
        eval_split=config.eval_split,
        prompt_template=config.prompt_template,
        enable_thinking=config.enable_thinking,
        max_prompt_tokens=config.max_prompt_tokens,
        n_eval_prompts=config.n_eval_prompts,
        problem_column=config.problem_column,
        answer_column=config.answer_column,
        system_prompt=config.system_prompt,
        now=date,
    )
    prompts = (problem.prompt_ids for problem in (*train, *evaluation))
    refuse_ids_beyond(vocab_size, tokenizer, prompts)
    stops, report = stop_token_ids(tokenizer, folder), [*report, *told_of_stops(tokenizer, folder)]
    templates = load_template(config.prompt_template), str(tokenizer.chat_template)
    return Problems(tokenizer, stops, train, evaluation, report, templates, date)


def shaped(config: Config, adapter: Path | None) -> Config:
    """The config with the adapter's own rank, alpha and targets, and nothing else to begin from.
    InputError if it is no adapter."""
    config = replace(config, adapter="")
    if adapter is None:
        return config
    shape = adapters.read_config(adapter)
    return replace(
        config,
        lora_r=shape.rank,
        lora_alpha=shape.alpha,
        lora_target_modules=tuple(p for p in PROJECTIONS if p in shape.target_modules),
    )


def begun(config: Config, given: Collection[str] = ()) -> Config:
    """The config with the shape of the adapter that it begins from, if it names one: a PEFT folder,
    or a run for its last. InputError for an option of another value than the adapter has, if it was
    asked for: it is among the `given`, or not the default."""
    if not config.adapter:
        return config
    folder = Path(config.adapter)
    folder = last_adapter(folder) if run_of_adapter(folder) == folder else folder
    own, default = shaped(config, folder), {f.name: f.default for f in fields(config)}
    alike = lambda x: {*x} if isinstance(x, tuple) else x  # noqa: E731
    shape = {name: getattr(own, name) for name in SHAPE}
    odd = [
        f"{name}={asked!r}, and the adapter has {there!r}"
        for name, there in shape.items()
        if alike(asked := getattr(config, name)) != alike(there)
        and (name in given or alike(asked) != alike(default[name]))
    ]
    if odd:
        raise InputError(f"adapter={folder}: {'; '.join(odd)}: leave the option away")
    return replace(config, adapter=str(folder), **shape)


def columns_of(problems: Sequence[Problem]) -> list[str]:
    """The names of the columns that reward functions may ask for."""
    return list(dict.fromkeys(name for problem in problems for name in problem.columns))


def fingerprints(config: Config, problems: Problems) -> dict[str, str]:
    """Of what a run is made from beside its options: a resumed one must find the same."""
    begun_from = {"adapter": adapters.fingerprint(Path(config.adapter))} if config.adapter else {}
    return {
        "model": weights_fingerprint(model_folder(config.model_id)),
        "problems": problems.fingerprint,
        **begun_from,
    }


def open_policy(config: Config, *, abstract: bool = False) -> Policy:
    """The base model with a fresh adapter, or the one that the config begins from; `abstract`:
    shapes alone, for who only needs those. InputError if that adapter does not fit the model."""
    if config.attn_implementation == "cudnn" and (found := jax.default_backend()) != "gpu":
        raise InputError(f"attn_implementation=cudnn needs a GPU, JAX has {found}; take xla")
    folder = model_folder(config.model_id)
    shape: dict[str, Any] = {
        "dtype": config.dtype,
        "rank": config.lora_r,
        "alpha": config.lora_alpha,
        "target_modules": config.lora_target_modules,
    }
    shapes, mesh = Policy(*split(abstract_model(folder, **shape))), make_mesh(config.fsdp)
    for path, leaf in nnx.to_flat_state(shapes.base):
        lies(mesh, path, leaf.shape)  # or says why not
    start = adapters.load(Path(config.adapter), shapes.adapter) if config.adapter else None
    if config.adapter:
        _warn_of_another_base(config)
    if abstract:
        return shapes
    policy = Policy(*split(load_model(folder, **shape, seed=config.seed, mesh=mesh)))
    return policy if start is None else replace(policy, adapter=start)


def _warn_of_another_base(config: Config) -> None:
    """An adapter fits any model of its shape; the name of its base tells those apart."""
    named = adapters.base_of(Path(config.adapter))
    if named and Path(named).name != Path(config.model_id).name:
        log.warning("adapter=%s was made for the base %s, and model_id is %s: on other weights it "
                    "is no start", config.adapter, printable(named), config.model_id)  # fmt: skip


def open_policies(configs: Sequence[Config], *, abstract: bool = False) -> Policy:
    """`open_policy` of each member over one base: adapters [E, ...], the smaller ones filled up
    with zeros to the largest rank."""
    if len(configs) == 1:
        policy = open_policy(configs[0], abstract=abstract)
        return replace(policy, adapter=jax.eval_shape(stacked_up, [policy.adapter])
                       if abstract else stacked_up([policy.adapter]))  # fmt: skip
    rank = max(c.lora_r for c in configs)
    alike = replace(configs[0], lora_r=rank, lora_alpha=rank, adapter="")  # a scale of 1
    policy = open_policy(alike, abstract=abstract)
    scales = tuple(c.lora_alpha / c.lora_r for c in configs)
    like = [jax.eval_shape(lambda a, r=c.lora_r: with_rank(a, r), policy.adapter) for c in configs]

    for config in configs:
        if config.adapter:
            _warn_of_another_base(config)

    def adapters_of_all() -> nnx.State:
        each = [
            adapters.load(Path(c.adapter), own) if c.adapter else fresh_adapter(own, c.seed)
            for c, own in zip(configs, like, strict=True)
        ]
        return stacked_up([with_rank(adapter, rank) for adapter in each])

    found = jax.eval_shape(adapters_of_all) if abstract else adapters_of_all()
    return replace(policy, adapter=found, scales=scales)


def sampled_at_once(config: Config, policy: Policy, free: int | None) -> int:
    """How many completions the embedded sampler decodes at once, of `free` bytes: those of a step
    of all members, or as many as fit."""
    c, n_rows = config, len(policy.scales) * config.n_completions_per_step
    if free is None:
        return n_rows
    return rows_that_fit(
        nnx.merge(policy.graph, policy.adapter, policy.base).config, c.dtype, free,
        n_rows=n_rows, group_size=c.group_size, longest=c.max_prompt_tokens,
        max_tokens=c.max_tokens,
    )  # fmt: skip


def open_sampler(
    config: Config, policy: Policy, stops: Sequence[int], run_id: str, *, alone: bool = True
) -> Sampler:
    """The sampler that the config asks for, of one adapter or of those of several members;
    RunError if the server cannot be used. `alone`: what other runs have left on the server goes."""
    if config.rollout == "jax":
        return JaxSampler(
            policy.graph,
            policy.adapter,
            policy.base,
            scales=policy.scales,
            stop_token_ids=stops,
            max_tokens=config.max_tokens,
            max_rows=sampled_at_once(config, policy, free_memory()),
        )
    flags = {"model_id": config.model_id, "lora_r": rank_of(policy.adapter), "dtype": config.dtype,
             "max_prompt_tokens": config.max_prompt_tokens, "max_tokens": config.max_tokens,
             "vllm_url": config.vllm_urls[0], "max_loras": len(policy.scales)}  # fmt: skip
    if config.rollouts_ahead:
        flags["rollouts_ahead"] = config.rollouts_ahead
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return VllmSampler(
        config.vllm_urls,
        run_id=run_id,
        max_tokens=config.max_tokens,
        max_model_len=config.max_model_len,
        vocab_size=model_config(model_folder(config.model_id)).vocab_size,
        stop_token_ids=stops,
        timeout_s=config.vllm_timeout_s,
        move_s=config.vllm_move_s,
        start_command=shlex.join(["python", "-m", "jgrpo.serve", *words]),
        alone=alone,
    )


def open_grader(config: Config, stack: ExitStack) -> Grader:
    """A grader whose workers start in the background; call its self_test before the first step."""
    grader = Grader(max_workers=config.grader_workers, timeout_s=config.grader_timeout_s)
    return stack.enter_context(grader)
