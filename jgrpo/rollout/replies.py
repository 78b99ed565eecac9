"""What a vLLM server answers: its completions, or what is wrong with the reply.

Nothing of a reply is taken on trust: it must be of the model, the prompt and the number that were
asked for, each completion with ids and finite logprobs, ended as the request says.
"""

from typing import Any

import httpx

from jgrpo.errors import RunError, printable
from jgrpo.rollout.protocol import Completion

Body = dict[str, Any]


class Retry(ValueError):
    """An answer that may be another one next time."""


def words(response: httpx.Response) -> str:
    """The server's own explanation of a refusal."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        said = response.text
    return printable(said[:500])


def json_of(response: httpx.Response) -> Any:
    """The JSON of an answer; RunError with the server's own words if it is a refusal."""
    if not response.is_success:
        key = "; VLLM_API_KEY must hold the server's key" * (response.status_code == 401)
        raise RunError(f"{response.url}: HTTP {response.status_code}: {words(response)}{key}")
    try:
        return response.json()
    except (ValueError, RecursionError):
        if "json" in response.headers.get("Content-Type", ""):  # it was, when it left the server
            raise Retry(f"a broken reply, {response.text[-80:]!r} at its end") from None
        raise RunError(f"{response.url}: not JSON: {response.text[:200]!r}") from None


def read_completions(
    response: httpx.Response, *, asked: Body, vocab_size: int
) -> list[Completion] | None:
    """The completions; None if the server does not know the model. RunError if a reply is wrong."""
    if response.status_code == 404:
        return None
    try:
        return completions_of(json_of(response), asked, vocab_size)
    except Retry:
        raise
    except ValueError as error:
        raise RunError(f"{response.url}: bad reply: {error}") from None


def completions_of(reply: Any, asked: Body, vocab_size: int) -> list[Completion]:
    """The completions of a reply in the order of their seeds; ValueError says what is wrong."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ValueError("no choices")
    if reply.get("model") != asked["model"]:
        raise ValueError(f"model {reply.get('model')!r}, {asked['model']!r} was asked for")
    if len(choices) != asked["n"]:
        raise ValueError(f"{len(choices)} choices, {asked['n']} were asked for")
    numbers = [choice.get("index") for choice in choices]
    if any(numbers.count(g) != 1 for g in range(asked["n"])):
        raise ValueError(f"choices numbered {numbers}")
    return [_completion_of(choices[numbers.index(g)], asked, vocab_size) for g in range(asked["n"])]


def _completion_of(choice: dict, asked: Body, vocab_size: int) -> Completion:
    ids, logprobs, reason = (choice.get(k) for k in ("token_ids", "logprobs", "finish_reason"))
    logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if reason == "abort":  # as of a server that is being shut down
        raise Retry("the server aborted the request")
    if ids is None or choice.get("prompt_token_ids") is None:
        raise ValueError(
            "no token ids: the server does not know return_token_ids (vLLM does since 0.10.2), or "
            "something between drops them; text alone cannot be trained on"
        )
    if choice.get("prompt_token_ids") != asked["prompt"]:
        raise ValueError("prompt_token_ids are not those of the request")
    if not isinstance(ids, list) or not ids or not all(_is_token(x, vocab_size) for x in ids):
        raise ValueError(f"token_ids: {str(ids)[:80]} (the model knows {vocab_size})")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise ValueError(f"token_logprobs of {len(ids)} token_ids: {str(logprobs)[:80]}")
    if not all(map(_is_logprob, logprobs)):
        raise ValueError(f"token_logprobs {str(logprobs)[:80]}: must be numbers from -9999 to 0")
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason {reason!r}: must be stop or length")
    ends = [token in asked["stop_token_ids"] for token in ids]
    if any(ends[:-1]) or ends[-1] != (reason == "stop"):
        raise ValueError(
            f"finish_reason {reason!r}, but end tokens at {ends.count(True)} places, "
            f"last token {ids[-1]}, stop_token_ids {asked['stop_token_ids']}"
        )
    if len(ids) > asked["max_tokens"]:
        raise ValueError(f"{len(ids)} tokens, max_tokens is {asked['max_tokens']}")
    if reason == "length" and len(ids) < asked["max_tokens"]:
        raise ValueError(
            f"cut at {len(ids)} tokens, max_tokens is {asked['max_tokens']}: the server's "
            "--max-model-len is too small"
        )
    return Completion(ids, logprobs, reason)


def _is_token(x: Any, vocab_size: int) -> bool:
    return type(x) is int and 0 <= x < vocab_size


def _is_logprob(x: Any) -> bool:
    """vLLM writes -9999 for minus infinity; rounding may leave a logprob a little above 0."""
    return type(x) in (int, float) and -9999 < x < 0.01
