"""Where completions end, and which tokens beyond a model's vocabulary matter."""

import json

import pytest
from test_problems import byte_tokenizer

from jgrpo.errors import InputError
from jgrpo.prompts.tokenizer import (
    load_tokenizer,
    refuse_ids_beyond,
    stop_token_ids,
    told_of_stops,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def saved(folder, *, template=CHATML, special=(), plain=(), **fields):
    """A tokenizer of 258 bytes, </s> (token 1) its eos, and what is added, in a model's folder."""
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(plain))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize(
    ("template", "added"),
    [
        (CHATML, {258}),  # <|im_end|> and a new line
        ("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}", {258}),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", set()),  # the eos itself
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", set()),
        ("{% for m in messages %}<|im_end|>{{ m.content }}\n{% endfor %}", set()),  # before it
        ("{% for m in messages %}{{ m.content }} END<|im_end|>{% endfor %}", set()),  # a text ends
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", set()),
        ("{{ raise_exception('no') }}<|im_end|>", set()),
        (None, set()),
    ],
)
def test_completions_end_where_the_template_ends_a_turn(tmp_path, template, added):
    folder = saved(tmp_path, template=template, special=["<|im_end|>", "<|im_start|>"])
    tokenizer = load_tokenizer(folder)
    assert set(stop_token_ids(tokenizer, folder)) == {1} | added
    told = told_of_stops(tokenizer, folder)
    assert len(told) == len(added)
    assert all("<|im_end|> too (token 258)" in line and "eos is </s>" in line for line in told)


def test_an_end_of_turn_that_generation_config_names_is_not_told(tmp_path):
    folder = saved(tmp_path, special=["<|im_end|>"])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 258]}')
    tokenizer = load_tokenizer(folder)
    assert stop_token_ids(tokenizer, folder) == (1, 258)
    assert told_of_stops(tokenizer, folder) == []


def test_a_template_alone_can_end_completions(tmp_path):
    folder = saved(tmp_path, special=["<|im_end|>"])
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = None
    assert stop_token_ids(tokenizer, folder) == (258,)
    assert "eos is none" in told_of_stops(tokenizer, folder)[0]


def test_a_pad_token_beyond_the_vocabulary_is_harmless_unless_a_prompt_holds_it(tmp_path):
    folder = saved(tmp_path, template=None, special=["[PAD]", "<extra>"], vocab_size=258)
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = "[PAD]"
    assert len(tokenizer) == 260
    refuse_ids_beyond(258, tokenizer, tokenizer(["2 + 2?", ""]).input_ids)
    with pytest.raises(InputError, match=r"'\[PAD\]', token 258.*vocab_size=258.*a \[PAD\] b"):
        refuse_ids_beyond(258, tokenizer, tokenizer(["2 + 2?", "a [PAD] b"]).input_ids)


@pytest.mark.parametrize(
    ("added", "vocab_size", "named"),
    [
        ({"plain": ["word"], "template": None}, 258, "'word' is beyond"),  # any text may hold it
        ({"special": ["<|im_end|>", "<|im_start|>"]}, 259, "'<|im_start|>' is beyond"),
        ({"template": None}, 200, "has 258 tokens, config.json makes it vocab_size=200"),
    ],
    ids=["a word", "in the template", "another model's"],
)
def test_a_token_that_is_needed_beyond_the_vocabulary_is_refused(
    tmp_path, added, vocab_size, named
):
    with pytest.raises(InputError) as error:
        load_tokenizer(saved(tmp_path, vocab_size=vocab_size, **added))
    assert named in str(error.value)


@pytest.mark.parametrize("eos", [258, 32000, [1, 258], -1])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_eos_beyond_the_vocabulary_is_told(tmp_path, name, eos):
    folder = saved(tmp_path, template=None, vocab_size=258)
    tokenizer = load_tokenizer(folder)
    assert stop_token_ids(tokenizer, folder) == (1,)
    (tmp_path / name).write_text(json.dumps({"vocab_size": 258, "eos_token_id": eos}))
    odd = eos[1] if isinstance(eos, list) else eos
    with pytest.raises(InputError, match=rf"{name}: eos_token_id={odd} is beyond.*vocab_size=258"):
        stop_token_ids(tokenizer, folder)


def test_a_tokenizers_own_eos_beyond_the_vocabulary_is_told(tmp_path):
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 258}')
    with pytest.raises(InputError, match="'<end>' is beyond"):
        load_tokenizer(str(tmp_path))
