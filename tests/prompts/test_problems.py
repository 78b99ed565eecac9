"""Every problem that trains or evaluates is the one meant, read as the model reads it."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jgrpo.errors import InputError
from jgrpo.prompts.problems import load_problems, load_template, read_row, step_indices
from jgrpo.prompts.tokenizer import load_tokenizer, render, stop_token_ids

SHARED = Path(__file__).parents[3] / "shared"
ABSENT = "real problems are not part of this repository, and not in ../shared beside it"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=ABSENT)
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
OPTIONS = {
    "dataset_split": "",
    "eval_dataset_path": "",
    "eval_split": "",
    "prompt_template": "boxed.prompt",
    "enable_thinking": False,
    "max_prompt_tokens": 500,
    "n_eval_prompts": 1000,
}


def byte_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A token a byte, which like Llama's puts <s> before whatever it is given."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def write_rows(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(n: int, start: int = 0) -> list[dict]:
    return [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(start, start + n)]


# -- order


def test_each_epoch_visits_every_prompt_once_whatever_the_step_cuts():
    for per_step in (1, 3, 7, 10, 25):
        visited = [i for step in range(1, 71) for i in step_indices(10, per_step, 42, step)]
        assert len(visited) == 70 * per_step
        for epoch in range(len(visited) // 10):
            assert sorted(visited[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_the_order_is_a_function_of_seed_and_step():
    assert step_indices(50, 8, 1, 9) == step_indices(50, 8, 1, 9)
    assert step_indices(50, 50, 1, 1) != step_indices(50, 50, 2, 1)
    assert step_indices(50, 50, 1, 1) != step_indices(50, 50, 1, 2)  # epochs differ too
    assert step_indices(50, 50, 1, 1) != list(range(50))
    with pytest.raises(ValueError, match="step=0"):
        step_indices(50, 8, 1, 0)


# -- rows


@pytest.mark.parametrize(
    ("fields", "gold"),
    [
        ({"problem": "p", "solution": r"\boxed{1}, no: $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"question": "q", "answer": "12*30=<<12*30=360>>360\n#### 285,000"}, "285000"),
        ({"question": "q", "answer": "#### -$1,234,567.50"}, "-$1234567.50"),
        ({"question": "q", "answer": "#### (1,234)"}, "(1,234)"),  # a point, not a number
        ({"question": "q", "answer": "#### 1,23"}, "1,23"),
        ({"question": "q", "answer": "#### 3 #### 4\n"}, "4"),
        ({"question": "q", "answer": " x = 4 "}, "x = 4"),
        ({"question": "q", "answer": 18}, "18"),
        ({"question": "q", "answer": 0}, "0"),
        ({"question": "q", "answer": "so\n" + r"\boxed{7} apples"}, "7"),
        ({"problem": "p", "solution": r"\boxed{1}", "question": "q", "answer": "2"}, "1"),
    ],
)
def test_the_gold_answer_of_each_schema(fields, gold):
    assert read_row(fields)[1] == gold


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"problem": "p", "solution": "it is 4"}, "no .*boxed"),
        ({"problem": "p", "solution": r"\boxed{ }"}, "no .*boxed"),
        ({"problem": "p", "solution": None}, "no .*boxed"),
        ({"problem": " ", "solution": r"\boxed{1}"}, "problem is empty"),
        ({"question": "q", "answer": "first this\nthen that"}, "no answer"),
        ({"question": "q", "answer": "18 ####"}, "no answer"),
        ({"question": "q", "answer": float("nan")}, "no answer"),
        ({"question": "q", "answer": True}, "no answer"),
        ({"problem": "p", "text": "2"}, "no column with an answer"),
        ({"text": "p", "answer": "2"}, "no column with a problem"),
        ({"prompt": [{"role": "system", "content": "s"}], "answer": "2"}, "no message of a user"),
        ({"prompt": [{"role": "user", "content": None}], "answer": "2"}, "role and a content"),
        ({"question": "q", "answer": []}, "no answer"),
        ({"question": "q", "answer": [None]}, "no answer"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(fields, reason):
    with pytest.raises(ValueError, match=reason):
        read_row(fields)


# -- prompts


def test_the_default_template_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = load_template("boxed.prompt")
    assert template.count("{problem}") == 1
    assert r"\boxed{}" in template
    (tmp_path / "boxed.prompt").write_text("mine: {problem}\n")
    assert load_template("boxed.prompt") == "mine: {problem}"
    (tmp_path / "bom.prompt").write_text("\ufeff{problem}\nThink.", "utf-8")
    assert load_template("bom.prompt") == "{problem}\nThink."  # Windows writes the mark
    (tmp_path / "bad.prompt").write_text("{ problem }")
    with pytest.raises(InputError, match=r"bad.prompt: must contain \{problem\}"):
        load_template("bad.prompt")
    with pytest.raises(InputError, match=r"none.prompt: no such file"):
        load_template("none.prompt")


def test_a_problem_with_braces_goes_in_as_it_is(tmp_path):
    rows = [{"problem": r"{x} $\frac{1}{2}$ %s \1", "solution": r"\boxed{1}"}] + [
        {"problem": f"p{i}", "solution": r"\boxed{2}"} for i in range(4)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "t.prompt").write_text("Q {problem} in {} and {{}}")
    options = OPTIONS | {"prompt_template": str(tmp_path / "t.prompt")}
    (first, *_), _, _ = load_problems(byte_tokenizer(), dataset_path=path, **options)
    assert first.prompt == r"<s>[user]Q {x} $\frac{1}{2}$ %s \1 in {} and {{}}</s>[assistant]"
    assert first.problem == rows[0]["problem"]
    assert first.gold == "1"


def test_there_is_one_bos_with_a_chat_template_and_without():
    chat, base = byte_tokenizer(), byte_tokenizer(None)
    (prompt,), (ids,) = render(chat, ["ab"], enable_thinking=False)
    assert prompt == "<s>[user]ab</s>[assistant]"
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert chat.decode(ids) == prompt
    (prompt,), (ids,) = render(base, ["ab"], enable_thinking=False)
    assert prompt == "ab"
    assert ids[0] == 0
    assert len(ids) == 3


def test_the_report_says_when_the_chat_template_is_missing_or_deaf(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sums(5))
    thinking = OPTIONS | {"enable_thinking": True}
    _, _, report = load_problems(byte_tokenizer(None), dataset_path=path, **OPTIONS)
    assert any("no chat template" in line for line in report)
    (first, *_), _, report = load_problems(byte_tokenizer(), dataset_path=path, **thinking)
    assert first.prompt.endswith("[assistant]<think>")
    assert not any("enable_thinking" in line for line in report)
    deaf = byte_tokenizer(CHAT.replace("{% if enable_thinking %}<think>{% endif %}", ""))
    _, _, report = load_problems(deaf, dataset_path=path, **thinking)
    assert any("enable_thinking=True changes nothing" in line for line in report)


@pytest.mark.parametrize(
    ("written", "date"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "05 Mar 2024"),
        # Llama 3.2's way: a date that is given goes before today's.
        (
            "{% if not date_string is defined %}{% if strftime_now is defined %}"
            "{% set date_string = strftime_now('%H:%M:%S') %}{% endif %}{% endif %}"
            "{{ date_string }}",
            "06:07:08",
        ),
        ("{{ 'strftime_now' }}", None),
    ],
)
def test_a_template_writes_the_date_that_it_is_given_and_that_is_told(
    written, date, tmp_path, caplog
):
    path, now = write_rows(tmp_path / "rows.jsonl", sums(5)), datetime(2024, 3, 5, 6, 7, 8)
    tokenizer = byte_tokenizer(f"{written} {CHAT}")
    train, evaluation, _ = load_problems(tokenizer, dataset_path=path, now=now, **OPTIONS)
    for problem in (*train, *evaluation):
        assert problem.prompt.startswith(f"{date or 'strftime_now'} <s>")
        assert tokenizer.decode(problem.prompt_ids) == problem.prompt
    assert ("that of 2024-03-05 06:07" in caplog.text) == (date is not None)


@pytest.mark.parametrize(
    "before", ["", "\n", " ", "\n\n  ", "  {% if true %}\n x\n  {% endif %}\n"]
)
def test_a_template_that_writes_the_date_is_otherwise_rendered_as_it_is(before):
    template = before + "{%- if true -%} {{ strftime_now('%Y') }}\n{% endif %}" + CHAT
    chat = [{"role": "user", "content": "2 + 1?"}]
    tokenizer, now = byte_tokenizer(template), datetime.now()
    ours, _ = render(tokenizer, [chat], enable_thinking=False, now=now)
    assert ours == tokenizer.apply_chat_template(
        [chat], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert ours[0].startswith(f"{now:%Y}") or before


def test_a_template_that_makes_up_the_format_of_a_date_is_refused():
    tokenizer = byte_tokenizer("{{ strftime_now('%' ~ 'Y') }}" + CHAT)
    with pytest.raises(InputError, match="needs a format that the template spells out"):
        render(tokenizer, ["1"], enable_thinking=False)


# -- which problems


def test_no_evaluation_problem_is_trained_on_and_every_loss_is_counted(tmp_path):
    rows = [
        *sums(8),
        {"question": " 2 +  1?\n", "answer": "#### 3"},  # 8: repeats 2, blanks aside
        {"question": "16 +\n1?", "answer": "#### 17"},  # 9: repeats 16, an evaluation row
        {"question": "9 + 1?", "answer": ""},  # 10: no answer
        {"question": "x" * 600, "answer": "#### 1"},  # 11: too long
        {"question": "a</s>b", "answer": "#### 1"},  # 12: would end the user's turn
        *sums(3, start=13),
        *sums(4, start=16),  # the last fifth of 20
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    train, evaluation, report = load_problems(byte_tokenizer(), dataset_path=path, **OPTIONS)
    assert [p.index for p in train] == [0, 1, 2, 3, 4, 5, 6, 7, 13, 14, 15]
    assert [p.index for p in evaluation] == [16, 17, 18, 19]
    assert not {p.problem for p in train} & {p.problem for p in evaluation}
    text = "\n".join(report)
    for part in (
        "repeats an earlier problem: 1 rows (train[8])",
        "also an evaluation problem: 1 rows (train[9])",
        "no answer after ####, in \\boxed{}, or as the only line: 1 rows (train[10])",
        "prompt longer than max_prompt_tokens=500: 1 rows (train[11])",
        "a special token of the tokenizer is in the problem: 1 rows (train[12])",
        "11 training problems",
        "4 of 4 evaluation problems",
    ):
        assert part in text


def test_the_evaluation_is_spread_over_the_rows_and_the_same_for_every_seed(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sums(50))
    options = OPTIONS | {"n_eval_prompts": 4}
    _, evaluation, _ = load_problems(byte_tokenizer(), dataset_path=path, **options)
    assert [p.index for p in evaluation] == [40, 42, 45, 47]


def test_no_problem_left_says_where_they_went(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sums(10))
    options = OPTIONS | {"max_prompt_tokens": 3}
    with pytest.raises(InputError, match="no training problem is left") as error:
        load_problems(byte_tokenizer(), dataset_path=path, **options)
    assert "max_prompt_tokens=3: 8 rows (train[0], train[1], train[2], ...)" in str(error.value)


def test_wrong_columns_are_named_with_the_two_schemas(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "target": "b"}] * 5)
    with pytest.raises(InputError, match=r"'prompt', 'target'.*'problem' and 'solution'.*'answer'"):
        load_problems(byte_tokenizer(), dataset_path=path, **OPTIONS)


# -- the model's tokenizer


def test_stop_tokens_come_from_all_three_files(tmp_path):
    tokenizer = byte_tokenizer()
    assert stop_token_ids(tokenizer, str(tmp_path)) == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 1]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert stop_token_ids(tokenizer, str(tmp_path)) == (1, 5, 9)
    tokenizer.eos_token = tokenizer.chat_template = None
    assert stop_token_ids(tokenizer, str(tmp_path)) == (1, 5, 9)
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="no eos_token_id"):
        stop_token_ids(tokenizer, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json"):
        stop_token_ids(tokenizer, str(tmp_path))


def test_a_saved_tokenizer_is_loaded_and_an_empty_folder_named(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert render(loaded, ["ab"], enable_thinking=False)[0] == ["<s>[user]ab</s>[assistant]"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))


@needs_shared
@pytest.mark.parametrize("thinking", [False, True])
def test_qwen3_reads_what_its_own_chat_template_writes(thinking):
    model = str(SHARED / "models" / "qwen3-tokenizer")
    tokenizer = load_tokenizer(model)
    (prompt,), (ids,) = render(tokenizer, ["hi"], enable_thinking=thinking)
    empty_thought = "" if thinking else "<think>\n\n</think>\n\n"
    assert prompt == f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{empty_thought}"
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    assert list(ids) == own
    assert stop_token_ids(tokenizer, model) == (151645,)


@needs_shared
@pytest.mark.parametrize("name", ["math", "gsm8k"])
def test_every_row_of_the_real_data_is_read(name):
    tokenizer = load_tokenizer(str(SHARED / "models" / "qwen3-tokenizer"))
    options = OPTIONS | {
        "eval_dataset_path": str(SHARED / "data" / f"{name}_eval.jsonl"),
        "max_prompt_tokens": 4096,
    }
    path = str(SHARED / "data" / f"{name}_train.jsonl")
    train, evaluation, report = load_problems(tokenizer, dataset_path=path, **options)
    assert (len(train), len(evaluation)) == (1200, 300)
    assert not any("left out" in line for line in report)
    for p in train + evaluation:
        assert tokenizer.decode(p.prompt_ids) == p.prompt
        assert p.problem in p.prompt
    if name == "gsm8k":
        assert all(float(p.gold) == float(p.gold) for p in train + evaluation)  # all are numbers
