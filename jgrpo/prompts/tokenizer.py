"""The model's own tokenizer: loading it, the ids that end a completion, and its chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import jinja2
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jgrpo.errors import InputError


def load_tokenizer(model_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder; code that a model brings along is never run.

    InputError if there is none, or if it has more tokens than the model.
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
    vocab_size = _read_model_json(model_id, "config.json").get("vocab_size", len(tokenizer))
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"model_id={model_id}: the tokenizer has {len(tokenizer)} tokens, config.json makes it "
            f"vocab_size={vocab_size}; put the model's own tokenizer there"
        )
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_id: str) -> tuple[int, ...]:
    """The ids that end a completion, sorted: the tokenizer's, generation_config's and config's.

    They differ (Qwen3 chat: 151645; its generation_config adds 151643). A hub file that cannot be
    reached counts as absent. Raises InputError if no id is found.
    """
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        eos = _read_model_json(model_id, name).get("eos_token_id")
        found = eos if isinstance(eos, list) else [eos]
        if not all(i is None or isinstance(i, int) for i in found):
            raise InputError(f"model_id={model_id}: {name}: eos_token_id={eos!r}: needs token ids")
        ids.update(found)
    if not (stop := sorted(i for i in ids if i is not None)):
        raise InputError(
            f"model_id={model_id}: no eos_token_id in the tokenizer, generation_config.json or "
            "config.json: completions could never end; set one in generation_config.json"
        )
    return tuple(stop)


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
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Each conversation as the model reads it: text and ids, up to where its answer begins. A text
    is a user's message; `system_prompt` goes before those that bring no system turn.

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


def _conversation(
    chat: str | Sequence[Mapping[str, str]], system_prompt: str
) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": chat}] if isinstance(chat, str) else list(map(dict, chat))
    if system_prompt and all(turn["role"] != "system" for turn in turns):
        return [{"role": "system", "content": system_prompt}, *turns]
    return turns
