"""What a server's reply must hold, and what is said of one that does not."""

import pytest

from jgrpo.rollout.replies import completions_of

ASKED = {"model": "m", "prompt": [1, 2], "n": 1, "max_tokens": 4, "stop_token_ids": [2]}
CHOICE = {
    "index": 0, "text": "a", "logprobs": {"token_logprobs": [-0.1]}, "finish_reason": "stop",
    "token_ids": [2], "prompt_token_ids": [1, 2],
}  # fmt: skip


def read(**changes):
    choice = {k: v for k, v in (CHOICE | changes).items() if v != "absent"}
    return completions_of({"model": "m", "choices": [choice]}, ASKED, 50)


def test_a_reply_that_holds_all_is_read():
    [completion] = read()
    assert (completion.token_ids, completion.finish_reason) == ([2], "stop")


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("name", ["token_ids", "prompt_token_ids"])
def test_a_reply_without_token_ids_names_the_option_and_the_version_that_has_it(name, value):
    with pytest.raises(ValueError, match=r"return_token_ids \(vLLM does since 0\.10\.2\)"):
        read(**{name: value})


def test_other_ids_than_those_of_the_request_are_told_as_that():
    with pytest.raises(ValueError, match="not those of the request"):
        read(prompt_token_ids=[1, 3])
