"""The model's own tokenizer: loading it, the ids that end a completion, and its chat template."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import jinja2
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jgrpo.errors import InputError

MARK = "answer-7351"
"""Stands for an answer where only the text behind it is of interest."""
DATED = """\
{%- macro strftime_now(format) %}{{ texts_of_dates[format] if format in texts_of_dates else \
raise_exception("strftime_now needs a format that the template spells out") }}{% endmacro %}
"""
"""Before a template: transformers' own would write today's date, and no function can be given."""


def load_tokenizer(model_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder; code that a model brings along is never run.

    InputError if there is none, or if it has tokens that the model has not. One that nothing here
    writes, such as a [PAD] that was added for padding, does no harm.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        known = tokenizer("1", add_special_tokens=False).input_ids
        if set(known) <= {tokenizer.unk_token_id}:  # transformers 5 makes an empty one of nothing
            raise ValueError("it knows no digits")
    except Exception as error:  # tokenizers raises Exception itself
        first_line = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(
            f"model_id={model_id}: no tokenizer could be loaded ({type(error).__name__}: "
            f"{first_line}); give a folder with tokenizer.json and "
            "tokenizer_config.json, or a hub id that this machine can reach"
        ) from error
    vocab_size = _vocab_size(model_id)
    if needed := needed_beyond(tokenizer, vocab_size):
        raise InputError(
            f"model_id={model_id}: the tokenizer has {len(tokenizer)} tokens, config.json makes it "
            f"vocab_size={vocab_size}, and {needed[0]!r} is beyond; put the model's own tokenizer "
            "there"
        )
    return tokenizer


def _vocab_size(model_id: str) -> float:
    return _read_model_json(model_id, "config.json").get("vocab_size") or math.inf


def needed_beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: float) -> list[str]:
    """The tokens beyond a model's vocabulary that may be written; a [PAD] is not."""
    beyond = sorted(token for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    return [token for token in beyond if _may_be_written(tokenizer, token)]


def _may_be_written(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Is a token more than a special one that neither the chat template nor the tokenizer adds?"""
    always = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    templates = str(tokenizer.chat_template or "")
    return token not in tokenizer.all_special_tokens or token in always or token in templates


def refuse_ids_beyond(
    vocab_size: int, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Sequence[int]]
) -> None:
    """InputError for a prompt that holds a token which the model has not."""
    for prompt in prompts:
        if (last := max(prompt, default=0)) >= vocab_size:
            raise InputError(
                f"a prompt holds {tokenizer.decode([last])!r}, token {last}, and the model has "
                f"vocab_size={vocab_size}: {tokenizer.decode([*prompt])!r:.80}; change the "
                "problem, or take the model's own tokenizer"
            )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_id: str) -> tuple[int, ...]:
    """The ids that end a completion, sorted: the tokenizer's, generation_config's and config's, and
    the token with which the chat template ends a turn.

    They differ (Qwen3 chat: 151645; its generation_config adds 151643; Qwen3-Base names 151643
    alone, and its template ends turns with 151645). A hub file that cannot be reached counts as
    absent. InputError if no id is found, or one beyond the model's vocabulary.
    """
    stop = sorted({*_eos_ids(tokenizer, model_id), *end_of_turn(tokenizer)})
    if not stop:
        raise InputError(
            f"model_id={model_id}: no eos_token_id in the tokenizer, generation_config.json or "
            "config.json: completions could never end; set one in generation_config.json"
        )
    return tuple(stop)


def told_of_stops(tokenizer: PreTrainedTokenizerBase, model_id: str) -> list[str]:
    """A line where the chat template ends turns with another token than the model's eos."""
    eos = _eos_ids(tokenizer, model_id)
    named = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(eos)))) or "none"
    return [
        f"completions end at {tokenizer.convert_ids_to_tokens(i)} too (token {i}): the chat "
        f"template ends turns with it, the model's own eos is {named}"
        for i in end_of_turn(tokenizer)
        if i not in eos
    ]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The added token that the chat template writes right behind an answer, if it does."""
    if tokenizer.chat_template is None:
        return ()
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": MARK}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
    except (jinja2.TemplateError, ValueError, TypeError, OverflowError):
        return ()  # `render` says so, of the prompts themselves
    _, mark, behind = text.rpartition(MARK)
    ids = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids if mark else []
    return tuple(i for i in ids[:1] if i in tokenizer.added_tokens_decoder)


def _eos_ids(tokenizer: PreTrainedTokenizerBase, model_id: str) -> set[int]:
    """Those that the model's files name."""
    named: list[tuple[str, Any]] = [("the tokenizer", tokenizer.eos_token_id)]
    for name in ("generation_config.json", "config.json"):
        named.append((name, _read_model_json(model_id, name).get("eos_token_id")))
    vocab_size, ids = _vocab_size(model_id), set()
    for where, eos in named:
        found = [i for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
        if not all(isinstance(i, int) for i in found):
            raise InputError(f"model_id={model_id}: {where}: eos_token_id={eos!r}: needs token ids")
        if odd := [i for i in found if not 0 <= i < vocab_size]:
            raise InputError(
                f"model_id={model_id}: {where}: eos_token_id={odd[0]} is beyond the model's "
                f"vocab_size={vocab_size}, so that completions could not end with it; set the "
                "token with which the model ends its answers"
            )
        ids.update(found)
    return ids


def _read_model_json(model_id: str, name: str) -> dict[str, Any]:
    try:
        file = Path(model_id) / name
        if not Path(model_id).is_dir():
            file = Path(huggingface_hub.hf_hub_download(model_id, name))
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("needs an object")
        return content
    except (FileNotFoundError, EntryNotFoundError):
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"model_id={model_id}: {name}: {error}") from error


def render(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    enable_thinking: bool,
    system_prompt: str = "",
    now: datetime | None = None,
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Each conversation as the model reads it: text and ids, up to where its answer begins. A text
    is a user's message; `system_prompt` goes before those that bring no system turn. A template
    that writes the date writes that of `now`.

    With a chat template the template writes every special token, so the tokenizer adds none (no
    second BOS). Without one the messages are continued as plain text.
    """
    has_template = tokenizer.chat_template is not None
    if not chats:
        return [], []
    conversations = [_conversation(chat, system_prompt) for chat in chats]
    texts = [messages[-1]["content"] for messages in conversations]
    prompts = ["\n\n".join(m["content"] for m in messages) for messages in conversations]
    if has_template:
        try:
            rendered = tokenizer.apply_chat_template(
                conversations,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
                **_dated(tokenizer.get_chat_template(), now or datetime.now()),
            )
        except (jinja2.TemplateError, ValueError, TypeError, OverflowError) as error:
            raise InputError(
                f"the chat template of {tokenizer.name_or_path} cannot write a user's message "
                f"({type(error).__name__}: {error}); mend or remove it there"
            ) from error
        prompts = cast(list[str], rendered)
        if not any(text in prompt for text, prompt in zip(texts, prompts, strict=True)):
            raise InputError(
                f"the chat template of {tokenizer.name_or_path} leaves the user's message out, and "
                f"writes {prompts[0]!r:.60}; mend or remove it there"
            )
    ids = tokenizer(prompts, add_special_tokens=not has_template)["input_ids"]
    return prompts, [tuple(row) for row in ids]


def _dated(template: str, now: datetime) -> dict[str, Any]:
    """What makes `apply_chat_template` write that date, if any: of each text in the template that
    may be a format."""
    if "strftime_now" not in template:
        return {}
    tokens = jinja2.Environment().lexer.tokenize(template)
    formats = {str(token.value) for token in tokens if token.type == "string"}
    dates = {format: now.strftime(format) for format in formats}
    return {"chat_template": DATED + template, "texts_of_dates": dates}


def writes_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does the chat template write the date, or the time?"""
    days = datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 9, 8, 7)
    one, other = (render(tokenizer, ["1"], enable_thinking=False, now=day)[0] for day in days)
    return one != other


def _conversation(
    chat: str | Sequence[Mapping[str, str]], system_prompt: str
) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": chat}] if isinstance(chat, str) else list(map(dict, chat))
    if system_prompt and all(turn["role"] != "system" for turn in turns):
        return [{"role": "system", "content": system_prompt}, *turns]
    return turns
