"""What a config names, opened in the order in which bad input shows first; for `train` and
`evaluate` alike."""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerBase

from jgrpo.answers.grader import Grader
from jgrpo.config import Config
from jgrpo.errors import InputError, short
from jgrpo.members import check_together
from jgrpo.policy import adapter as adapters
from jgrpo.policy.lora import nth, with_rank
from jgrpo.policy.mesh import make_mesh
from jgrpo.policy.weights import (
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
from jgrpo.rollout.protocol import Completion
from jgrpo.run.difficulty import of_this_difficulty
from jgrpo.run.policy import Policy
from jgrpo.run.rundir import date_of
from jgrpo.run.scoring import Scorers, open_scorers
from jgrpo.run.together import open_shared
from jgrpo.run.trackers import check_installed

log = logging.getLogger(__name__)


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
    refuse_two_at_a_time(configs[0], make_mesh(configs[0].fsdp).size)
    for config in configs:
        check_installed(config.report_to)
    shared = configs[0]
    problems = of_this_difficulty(
        shared, open_problems(shared, date_of(resume) if resume else None)
    )
    grader = open_grader(shared, stack)
    scorers = tuple(open_scorers(config, columns_of(problems.train)) for config in configs)
    return Session(tuple(configs), problems, open_shared(configs), grader, scorers)


def refuse_two_at_a_time(config: Config, n_devices: int) -> None:
    """InputError where sampling and training would both exchange between devices at a time."""
    if config.rollouts_ahead and config.rollout == "jax" and n_devices > 1:
        raise InputError(
            f"rollouts_ahead={config.rollouts_ahead} with rollout=jax on {n_devices} devices: "
            "sampling and training would exchange between them at the same time, and could wait "
            "for each other for ever; take --rollout vllm, or rollouts_ahead=0"
        )


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


def open_grader(config: Config, stack: ExitStack) -> Grader:
    """A grader whose workers start in the background; call its self_test before the first step."""
    grader = Grader(max_workers=config.grader_workers, timeout_s=config.grader_timeout_s)
    return stack.enter_context(grader)
