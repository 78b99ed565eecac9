"""A process reward is what the Skywork layout's own PyTorch modules say of each step, and the quick
start's process reward model tells care from haste.

The reference below shares nothing with rewards/prm.py: it cuts and encodes the text by itself, and
runs transformers' Qwen2Model and a torch Linear on one row at a time, without padding.
"""

import logging
import random
import re
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2Model, Qwen3Config

import jgrpo
from jgrpo.errors import InputError
from jgrpo.policy.batch import bucket
from jgrpo.prompts.tokenizer import load_tokenizer
from jgrpo.rewards.prm import ProcessRewards, encode, load_reward_model, steps
from jgrpo.tiny import prm as tiny_prm
from jgrpo.tiny import recipe as tiny

ABSENT = "Qwen3's tokenizer is not part of this repository, and not in ../shared beside it"
QWEN3 = Path(__file__).parents[3] / "shared" / "models" / "qwen3-tokenizer"
TOKENIZERS = [
    "tiny",
    pytest.param(
        "qwen3",
        marks=[pytest.mark.skipif(not QWEN3.is_dir(), reason=ABSENT), pytest.mark.slow],
    ),
]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
V_HEAD, V_BIAS = "v_head.summary.weight", "v_head.summary.bias"
PROBLEMS = ["What is 277 + 535?", "A box holds 29 coins. How many do 5 boxes hold?", "3 * 4"]
COMPLETIONS = [
    ["7+5+0=12, 7+3+1=11, 2+5+1=8. \\boxed{812}", "\\boxed{702}", "", "8. 1? 2!\n\n12\n"],
    ["9*5+0=45, 2*5+4=14. \\boxed{145}", "\\boxed{105}", " \n", "Ben has 3.14 coins. " * 9],
    ["12", "3 + 3 + 3 + 3\n= 12.", "\\boxed{12}. How many? 12!", "12"],
]


# -- the reference ----------------------------------------------------------------------------


def write_prm(folder: Path, tokenizer, make=Qwen2Config, **changes) -> Path:
    """Random weights of the layout; large, as in conftest, so that errors show."""
    vocab_size = len(tokenizer) + 3
    config = make(**({**SHAPE, "vocab_size": vocab_size, "architectures": ["Any"]} | changes))
    generator = torch.Generator().manual_seed(0)
    body = Qwen2Model(Qwen2Config(**({**SHAPE, "vocab_size": vocab_size})))
    tensors = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    tensors |= {V_HEAD: torch.zeros(1, SHAPE["hidden_size"]), V_BIAS: torch.zeros(1)}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
            tensor.uniform_(low, high, generator=generator)
        else:
            std = 2.0 if "embed" in name or "v_head" in name else 1.0
            tensor.normal_(0, std * tensor.shape[-1] ** -0.5, generator=generator)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TOKENIZERS)
def folder(request, tmp_path_factory) -> Path:
    real = request.param == "qwen3"
    tokenizer = load_tokenizer(str(QWEN3)) if real else tiny.make_tokenizer()
    return write_prm(tmp_path_factory.mktemp(request.param), tokenizer)


@pytest.fixture(scope="module")
def rewards(folder) -> ProcessRewards:
    return ProcessRewards(folder, dtype="float32", batch_size=4)


def cut(text: str) -> list[str]:
    """The steps, sign by sign."""
    lines, i = [""], 0
    while i < len(text):
        if text[i] == "\n":
            lines.append("")
        elif text[i] in " \t" and lines[-1][-1:] in (".", "!", "?"):
            lines.append("")
            while text[i + 1 : i + 2] in (" ", "\t"):
                i += 1
        else:
            lines[-1] += text[i]
        i += 1
    return [line for line in lines if line.split()]


class Reference:
    """The same folder in PyTorch, float32."""

    def __init__(self, folder: Path):
        tensors = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.body = Qwen2Model(Qwen2Config.from_pretrained(folder)).float().eval()
        self.body.load_state_dict({k[6:]: v for k, v in tensors.items() if k[:6] == "model."})
        self.head = torch.nn.Linear(SHAPE["hidden_size"], 1)
        self.head.load_state_dict({"weight": tensors[V_HEAD], "bias": tensors[V_BIAS]})

    @torch.no_grad()
    def __call__(self, problem, completion, *, problem_end="\n", newline=True, early=0):
        """Step scores; the options make mistakes: no newline, or scored `early` tokens ago."""
        ids = self.tokenizer.encode(problem + problem_end).ids
        ends = []
        for line in cut(completion):
            ids = ids + self.tokenizer.encode(line).ids
            ids = ids + self.tokenizer.encode("\n").ids * newline
            ends.append(len(ids) - 1 - early)
        hidden = self.body(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return torch.sigmoid(self.head(hidden)[ends, 0]).numpy()


PAIRS = [(p, c) for p, group in zip(PROBLEMS, COMPLETIONS, strict=True) for c in group]


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


def test_step_scores_are_the_reference_s(reference, rewards):
    for pair, scores in zip(PAIRS, rewards.step_scores(PAIRS), strict=True):
        expected = reference(*pair)
        assert scores.shape == expected.shape
        assert scores.dtype == np.float32
        assert np.abs(scores - expected).max(initial=0) < 1e-5
    everything = np.concatenate(rewards.step_scores(PAIRS))
    assert everything.std() > 0.1  # nothing that a constant would pass


def test_the_reward_is_the_mean_of_the_step_scores(reference, rewards):
    expected = [[reference(p, c).mean() if cut(c) else 0 for c in group]
                for p, group in zip(PROBLEMS, COMPLETIONS, strict=True)]  # fmt: skip
    got = rewards(PROBLEMS, COMPLETIONS)
    assert got.shape == (3, 4)
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() < 1e-5
    assert got[0, 2] == got[1, 2] == 0  # "" and a blank line: no steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake", [{"early": 1}, {"newline": False}, {"problem_end": ""}], ids=str
)
def test_each_of_these_mistakes_would_show(reference, rewards, mistake):
    pairs = [pair for pair in PAIRS if cut(pair[1])]
    for pair, scores in zip(pairs, rewards.step_scores(pairs), strict=True):
        assert np.abs(scores - reference(*pair, **mistake)).max() > 1e-3


@pytest.mark.slow
def test_neither_batch_size_nor_padding_nor_company_changes_a_score(folder, rewards):
    alone = [rewards.step_scores([pair])[0] for pair in PAIRS]
    for batch_size in (1, 3, 16):
        other = ProcessRewards(folder, dtype="float32", batch_size=batch_size)
        for pairs in (PAIRS, PAIRS[::-1]):
            got = dict(zip(pairs, other.step_scores(pairs), strict=True))
            for pair, scores in zip(PAIRS, alone, strict=True):
                np.testing.assert_allclose(got[pair], scores, rtol=0, atol=2e-6)


def test_each_pair_is_scored_once_in_few_shapes_longest_first(rewards, monkeypatch):
    run, seen = rewards._scores, []

    def spy(weights, ids, segments):
        seen.append((ids.shape, segments.sum(axis=1)))
        return run(weights, ids, segments)

    monkeypatch.setattr(rewards, "_scores", spy)
    twice = [group + group for group in COMPLETIONS]
    got = rewards(PROBLEMS, twice)
    np.testing.assert_array_equal(got[:, :4], got[:, 4:])
    lengths = np.concatenate([row_lengths for _, row_lengths in seen])
    n_scored = len({pair for pair in PAIRS if cut(pair[1])})
    assert n_scored == 9
    assert np.count_nonzero(lengths) == n_scored
    assert (np.diff(lengths) <= 0).all()
    assert [shape for shape, _ in seen] == [(4, bucket(n.max())) for _, n in seen]


def test_bfloat16_scores_are_near_and_the_head_stays_float32(folder, rewards):
    model = load_reward_model(folder, "bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model.model))} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model.v_head))} == {"float32"}
    got = ProcessRewards(folder, dtype="bfloat16", batch_size=4)(PROBLEMS, COMPLETIONS)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - rewards(PROBLEMS, COMPLETIONS)).max() < 0.1  # of scores in 0..1


@pytest.mark.parametrize("completions", [[["a"]], [["a"], ["b", "c"], ["d"]], []], ids=str)
def test_completions_that_are_no_rectangle_are_refused(rewards, completions):
    with pytest.raises(ValueError, match="needs \\[P\\]\\[G\\] completions and \\[P\\] problems"):
        rewards(PROBLEMS, completions)


def test_inputs_beyond_the_model_s_positions_are_warned_of_once(tmp_path, caplog):
    folder = write_prm(tmp_path, tiny.make_tokenizer(), max_position_embeddings=24)
    rewards = ProcessRewards(folder, dtype="float32", batch_size=2)
    rewards(["1 + 1"], [["2"]])
    assert not caplog.records
    for _ in range(2):
        rewards(["1 + 1"], [["2", "1 + 1 = 2. " * 4]])
    [record] = caplog.records
    assert (record.name, record.levelno) == ("jgrpo", logging.WARNING)
    # 6 tokens of the problem, 4 steps of 11.
    assert "reads 50 tokens, its max_position_embeddings is 24" in record.getMessage()


# -- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t\n", []),
        ("one", ["one"]),
        ("one\ntwo\n", ["one", "two"]),
        ("one\n\n \n\ntwo", ["one", "two"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("One.  \t Two. ", ["One.", "Two."]),
        ("One. \nTwo.\r\nThree.", ["One.", "Two.", "Three."]),
        ("Pi is 3.14, not 3.15.", ["Pi is 3.14, not 3.15."]),
        ("f(x)=x!+1; x.y", ["f(x)=x!+1; x.y"]),
        ("Wait... what?! No.", ["Wait...", "what?!", "No."]),
        ("  indented\n- item", ["  indented", "- item"]),
        # Not ends of sentences, but cut all the same: the rule knows no words.
        ("Take a prime, e.g. 7.", ["Take a prime, e.g.", "7."]),
        ("1. Add.\n2. Stop.", ["1.", "Add.", "2.", "Stop."]),
    ],
)
def test_steps_by_hand(text, expected):
    assert steps(text) == expected
    assert cut(text.replace("\r", "")) == expected  # the reference cuts alike


def test_every_step_ends_with_its_own_newline():
    tokenizer = tiny.make_tokenizer()  # a token a digit, sign, blank and newline
    ids, ends = encode(tokenizer, "1 + 1?", "1+1=3. 2\n\n7")
    assert tokenizer.decode(ids) == "1 + 1?\n1+1=3.\n2\n7\n"
    assert ends == [13, 15, 17]
    assert encode(tokenizer, "1 + 1?", "\n") == (ids[:7], [])


def test_the_problem_begins_with_the_tokenizer_s_own_start():
    tokenizer = tiny.make_tokenizer()
    tokenizer.bos_token = tiny.START
    assert tokenizer.decode(encode(tokenizer, "7", "")[0]) == f"{tiny.START}7\n"


@pytest.mark.skipif(not QWEN3.is_dir(), reason=ABSENT)
def test_qwen_s_newline_does_not_melt_into_a_step():
    # Encoded as one text, ".\n" is a single token, and the score would be read elsewhere.
    tokenizer = load_tokenizer(str(QWEN3))
    newline = tokenizer.encode("\n")[-1]
    ids, ends = encode(tokenizer, "1 + 1?", "It is 2.\nYes.")
    assert [ids[end] for end in ends] == [newline, newline]
    assert tokenizer.decode(ids) == "1 + 1?\nIt is 2.\nYes.\n"
    assert newline not in tokenizer.encode("1 + 1?\nIt is 2.\nYes.\n")[:-1]


# -- folders ----------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A good folder, to be damaged."""
    return write_prm(tmp_path, tiny.make_tokenizer())


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        ProcessRewards(folder, dtype="float32", batch_size=1)
    return str(error.value)


def test_all_that_does_not_fit_is_named_in_one_error(fresh):
    def edit(tensors):
        del tensors[V_HEAD]
        tensors[V_BIAS] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["score.weight"] = torch.ones(1)

    change(fresh, edit)
    for file in fresh.glob("*token*"):
        file.unlink()
    message = refusal(fresh)
    assert f"{V_HEAD} is missing (shape [1, 32])" in message
    assert f"{V_BIAS} has shape [2], config.json makes it [1]" in message
    assert "model.norm.weight has shape [31], config.json makes it [32]" in message
    assert "score.weight is not a parameter" in message
    assert f"{fresh} has no tokenizer.json" in message
    assert len(message.splitlines()) == 6


def test_a_language_model_is_no_reward_model(checkpoint, fresh):
    for name in ("config.json", "model.safetensors"):
        (fresh / name).write_bytes((checkpoint("qwen2", vocab_size=99) / name).read_bytes())
    assert f"{V_HEAD} is missing" in refusal(fresh)


def test_another_architecture_is_refused_by_name(tmp_path):
    folder = write_prm(tmp_path, tiny.make_tokenizer(), make=Qwen3Config)
    assert "config.json: model_type='qwen3'; a process reward model is a 'qwen2'" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"version":'])
def test_a_damaged_tokenizer_is_called_so(fresh, text):
    (fresh / "tokenizer.json").write_text(text)
    assert f"the tokenizer in {fresh} cannot be read" in refusal(fresh)


def test_the_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path):
    folder = write_prm(tmp_path, tiny.make_tokenizer())
    other = tiny.make_tokenizer()
    other.add_tokens([f"<{i}>" for i in range(4)])
    other.save_pretrained(folder)
    assert re.search(r"has 54 tokens, config.json makes it vocab_size=53", refusal(folder))


def test_a_pad_token_beyond_the_vocabulary_does_no_harm(tmp_path):
    folder = write_prm(tmp_path, tiny.make_tokenizer())
    kwargs = {"dtype": "float32", "batch_size": 2}
    scores = ProcessRewards(folder, **kwargs)
    padded = tiny.make_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.add_special_tokens({"additional_special_tokens": ["[A]", "[B]", "[C]"]})
    padded.save_pretrained(folder)
    with_pad = ProcessRewards(folder, **kwargs)
    assert len(with_pad.tokenizer) > with_pad.vocab_size
    group = [["1+1=2\nso 2"]]
    np.testing.assert_array_equal(with_pad(["1+1"], group), scores(["1+1"], group))
    written = with_pad(["1+1"], [["1+1=2[C]\nso 2"]])  # a policy wrote it out
    np.testing.assert_array_equal(written, scores(["1+1"], group))


def test_a_folder_that_is_none(tmp_path):
    assert "has no config.json" in refusal(tmp_path / "nowhere")


def test_a_head_over_the_vocabulary_may_lie_there_unused(fresh):
    expected = ProcessRewards(fresh, dtype="float32", batch_size=4)(PROBLEMS, COMPLETIONS)
    change(fresh, lambda tensors: tensors.update({"lm_head.weight": torch.ones(53, 32)}))
    got = ProcessRewards(fresh, dtype="float32", batch_size=4)(PROBLEMS, COMPLETIONS)
    np.testing.assert_array_equal(got, expected)


def test_a_sliding_window_loads_only_if_it_is_off(tmp_path):
    # Qwen2.5's config.json gives its width and says that it is not used.
    window = {"sliding_window": 4096, "max_window_layers": 21}
    folder = write_prm(tmp_path, tiny.make_tokenizer(), **window, use_sliding_window=False)
    ProcessRewards(folder, dtype="float32", batch_size=1)
    write_prm(tmp_path, tiny.make_tokenizer(), **window, use_sliding_window=True)
    assert "use_sliding_window=True is not supported" in refusal(folder)


# -- the quick start's model ------------------------------------------------------------------

SHIPPED = Path(jgrpo.__file__).with_name("tiny") / "base" / "prm"
RIGHT_LINE = "7+5+0=12, 7+3+1=11, 2+5+1=8."


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (f"{RIGHT_LINE} \\boxed{{812}}", [True, True]),
        (f"{RIGHT_LINE} \\boxed{{702}}", [True, False]),
        ("7+5+0=12, 7+3+0=10, 2+5+1=8. \\boxed{802}", [False, False]),
        ("7+5+0=12, 7+3+1=11. \\boxed{812}", [False, True]),
        ("\\boxed{812}", [True]),
        ("", []),
    ],
)
def test_labels_of_277_plus_535_by_hand(completion, expected):
    assert tiny_prm.labels("addition", 277, 535, completion) == expected


def test_a_right_line_gives_the_answer_and_a_slip_is_never_right():
    rng = random.Random(0)
    for _, *p in (tiny.problem(rng) for _ in range(500)):
        line = tiny_prm.columns(*p)
        assert tiny_prm.read_off(line) == tiny.answer(*p)
        assert tiny_prm.labels(*p, tiny_prm.slip(line, rng)) == [False]


def test_about_half_of_the_steps_of_solutions_are_right():
    rng = random.Random(0)
    right: dict[str, list[bool]] = {"line": [], "box": [], "bare": []}
    for _, *p in (tiny.problem(rng) for _ in range(2000)):
        verdicts = tiny_prm.labels(*p, "\n".join(tiny_prm.solution(*p, rng)))
        names = ["bare"] if len(verdicts) == 1 else ["line", "box"]
        for name, verdict in zip(names, verdicts, strict=True):
            right[name].append(verdict)
    shares = {name: np.mean(verdicts) for name, verdicts in right.items()}
    assert 0.45 < shares["line"] < 0.55
    assert 0.45 < shares["box"] < 0.65
    assert 0.2 < shares["bare"] < 0.4  # nothing to carry


def test_tokens_are_right_up_to_the_first_wrong_one():
    marks = tiny_prm.marked([5, 6, 9, 8, 7], [5, 6, 8, 7])
    assert marks.tolist() == [[5, 6, 9, 8, 7], [2, 2, 1, 1, 1], [6, 8, 0, 0, 0]]
    assert tiny_prm.marked([5, 6, 8], [5, 6, 8])[1:].tolist() == [[2, 2, 2], [6, 8, 0]]
    assert tiny_prm.marked([5, 8], [5, 6, 8])[1:].tolist() == [[2, 1], [6, 0]]


def test_training_rows_mark_their_steps_as_the_labels_say():
    tokenizer = tiny.make_tokenizer()
    newline = tokenizer.encode("\n")[-1]
    rows = islice(tiny_prm.corpus(tokenizer, {}, random.Random(2)), 50)
    n_right = n_wrong = 0
    for segments, ids, marks, following in rows:
        assert not marks[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            problem, _, completion = tokenizer.decode(ids[own]).partition("\n")
            a, b = map(int, re.findall(r"\d+", problem))
            [kind] = [kind for kind, texts in tiny.KINDS.items()
                      if problem in [text.format(a=a, b=b) for text in texts]]  # fmt: skip
            ends = own & (ids == newline)
            ends[np.flatnonzero(ends)[0]] = False  # the problem's own
            # At a step's newline, the mark is the verdict on the step.
            expected = tiny_prm.labels(kind, a, b, completion)
            assert (marks[ends] == 2).tolist() == expected
            assert (marks[own] > 0).sum() == len(tokenizer.encode(completion))
            assert not following[own][marks[own] < 2].any()
            n_right += sum(expected)
            n_wrong += len(expected) - sum(expected)
    assert min(n_right, n_wrong) > 50


@pytest.mark.slow
def test_no_held_out_problem_is_trained_on(monkeypatch):
    _, held_out = tiny.problem_sets(tiny.N_TRAIN, tiny.N_EVAL, seed=0)
    real, taught = tiny_prm.solution, []
    monkeypatch.setattr(tiny_prm, "solution", lambda *p: taught.append(p[:3]) or real(*p))
    list(islice(tiny_prm.corpus(tiny.make_tokenizer(), held_out, random.Random(1)), 2000))
    identities = {tiny.identity(*p) for p in taught}
    assert len(identities) > 1200
    assert not identities & set(held_out)


@pytest.fixture(scope="module")
def shipped() -> ProcessRewards:
    return ProcessRewards(SHIPPED, dtype="float32", batch_size=64)


@pytest.mark.slow
def test_the_shipped_model_puts_care_above_haste_on_held_out_problems(shipped):
    _, held_out = tiny.problem_sets(tiny.N_TRAIN, tiny.N_EVAL, seed=0)
    some = dict(list(held_out.items())[:150])
    care, haste = tiny_prm.care_and_haste(shipped, some).T
    assert len(care) > 90
    assert np.mean(care > haste) > 0.97
    assert care.mean() > haste.mean() + 0.6


@pytest.mark.slow
def test_the_shipped_model_knows_right_steps_from_wrong_ones(shipped):
    _, held_out = tiny.problem_sets(tiny.N_TRAIN, tiny.N_EVAL, seed=0)
    some = dict(list(held_out.items())[:60])
    accuracy = tiny_prm.step_accuracy(shipped, some, random.Random(1))
    assert accuracy["all"] > 0.85


def test_the_shipped_model_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 1.2e6
