"""What the page says of runs, against run folders written by hand."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from page_runs import HOSTILE, a_run, completion

from jgrpo.errors import InputError
from jgrpo.page.data import Runs, seed_groups
from jgrpo.page.health import health, where_time_went
from jgrpo.page.pieces import pieces, tokenizer_of
from jgrpo.page.sheet import sheet
from jgrpo.run.rundir import write_rollouts
from jgrpo.view import given, write


@pytest.fixture
def runs(tmp_path):
    return Runs([a_run(tmp_path / "a"), a_run(tmp_path / "b", seed=1)])


def test_runs_that_differ_by_their_seed_alone_are_one_group(tmp_path):
    three = Runs([a_run(tmp_path / name, seed=seed, lora_r=r)
                  for name, seed, r in (("a", 0, 1), ("b", 1, 1), ("c", 0, 4))])  # fmt: skip
    overview = three.overview()
    assert [group["runs"] for group in overview["groups"]] == [[0, 1], [2]]
    assert overview["groups"][0]["name"] == "lora_r=1"
    assert [run["differs"]["lora_r"] for run in overview["runs"]] == [1, 1, 4]


def test_runs_without_options_are_nobody_s_seed():
    groups = seed_groups(["a", "b"], {"a": {}, "b": {}}, {"a": {}, "b": {}})
    assert [group["runs"] for group in groups] == [[0], [1]]


def test_metrics_come_by_tag_and_are_read_again_when_they_have_grown(runs):
    assert runs.overview()["runs"][0]["metrics"]["eval/accuracy"] == ([0], [0.25])
    with (runs.folders[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "eval/accuracy": null}\n')
    assert runs.overview()["runs"][0]["metrics"]["eval/accuracy"] == ([0, 4], [0.25, None])


def test_a_step_tells_right_boxed_and_truncated_apart(runs):
    answer = runs.step(0, 2)
    rows = answer["rows"][:3]
    assert [row["right"] for row in rows] == [True, False, False]
    assert [row["answer"] for row in rows] == ["7", "8", None]
    assert [row["problem"] for row in answer["rows"]] == [0, 0, 0, 1, 1, 1]
    assert all(row["truncated"] for row in rows)


def test_gaps_are_sampler_minus_trainer_and_absent_where_the_trainer_had_none(runs):
    row = completion("p", "7.", right=False, advantage=-1.0)
    row["sampler_logprobs"], n = [-1.0] * len(row["token_ids"]), len(row["token_ids"])
    write_rollouts(runs.folders[0], 9, [row, row | {"trainer_logprobs": [-1.25] * n}])
    assert runs.completion(0, 9, 0)["gaps"] is None
    assert runs.completion(0, 9, 1)["gaps"] == [0.25] * n
    assert [row["largest_gap"] for row in runs.step(0, 9)["rows"]] == [None, 0.25]


def test_the_pieces_of_a_completion_are_its_text(runs):
    one = runs.completion(0, 1, 0)
    assert "".join(one["pieces"]) == one["completion"] == "1+6=7. \\boxed{7}"
    assert len(one["pieces"]) == len(one["token_ids"]) == len(one["logprobs"])


def test_an_end_token_is_a_piece_without_text(tmp_path):
    run = a_run(tmp_path / "a")
    tokenizer = tokenizer_of(str(tmp_path / "base"))
    ids = tokenizer.encode("7.", add_special_tokens=False).ids
    end = tokenizer.token_to_id(json.loads((tmp_path / "base/tokenizer_config.json").read_text())
                                ["eos_token"])  # fmt: skip
    assert pieces(tokenizer, [*ids, end], "7.")[-1] == ""
    assert pieces(tokenizer, ids, "something else") is None
    assert run.is_dir()


def test_characters_of_several_tokens_are_put_together():
    """Qwen3's tokenizer writes them as bytes."""
    folder = Path(__file__).parents[3] / "shared/models/qwen3-tokenizer"
    if (tokenizer := tokenizer_of(str(folder))) is None:
        pytest.skip("Qwen3's tokenizer is not part of this repository, nor in ../shared beside it")
    text = "Let 𝔸 be ∯ — 🧮🏽 漢字 é\n\\boxed{7}"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    found = pieces(tokenizer, ids, text)
    assert found is not None
    assert "".join(found) == text
    assert len(found) == len(ids)
    assert "" in found


def test_without_the_model_s_tokenizer_the_text_stays_whole(tmp_path):
    run = a_run(tmp_path / "a")
    config = json.loads((run / "config.json").read_text())
    config["config"]["model_id"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    one = Runs([run]).completion(0, 1, 0)
    assert one["pieces"] is None
    assert "not on this machine" in one["no_pieces"]
    assert one["completion"] == "1+6=7. \\boxed{7}"


def test_one_problem_is_found_in_all_steps_and_runs(runs):
    problems = runs.problems()
    assert [(p["text"], p["times"]) for p in problems] == [
        ("What is 1 + 6?", 8), ("What is 2 + 5?", 8)]  # fmt: skip
    found = runs.problem(problems[1]["key"])
    assert [(m["run"], m["step"]) for m in found["met"]] == [
        (run, step) for run in (0, 1) for step in (1, 2, 3, 4)
    ]
    assert [row["row"] for row in found["met"][0]["rows"]] == [3, 4, 5]


def test_a_problem_is_found_wherever_it_stands_in_its_line(runs):
    file = runs.folders[0] / "rollouts/step_000001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    turned = [{k: row[k] for k in reversed(row)} for row in lines]
    file.write_text("".join(json.dumps(row) + "\n" for row in turned))
    key = runs.problems()[0]["key"]
    assert (runs.problem(key)["met"][0]["step"], len(runs.problem(key)["met"][0]["rows"])) == (1, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda r: r.step(7, 1), "no run 7"),
        (lambda r: r.step(-1, 1), "no run"),
        (lambda r: r.step(0, 99), "has those of steps 1 to 4"),
        (lambda r: r.completion(0, 1, 99), "no completion 99"),
        (lambda r: r.problem("../../etc/passwd"), "no run has met"),
        (lambda r: r.report(0), "no report 0"),
    ],
)
def test_what_is_not_there_is_said(runs, call, said):
    with pytest.raises(InputError, match=re.escape(said)):
        call(runs)


def test_a_link_out_of_the_run_is_not_followed(runs, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(json.dumps(completion("p", "secret", right=True, advantage=0.0)))
    (runs.folders[0] / "rollouts/step_000009.jsonl").symlink_to(secret)
    with pytest.raises(InputError, match="leads out of the run folder"):
        runs.step(0, 9)


def test_a_torn_line_is_named(runs):
    (runs.folders[0] / "rollouts/step_000001.jsonl").write_text('{"problem": "x", "comp')
    with pytest.raises(InputError, match="step 1, completion 0: not a line of a rollouts file"):
        runs.step(0, 1)


# -- health -----------------------------------------------------------------------------------


def test_a_value_above_its_limit_or_not_finite_is_a_worry_and_one_at_it_is_not():
    metrics = {
        "train/truncated_fraction": ([1, 2, 3, 4], [0.1, 0.2, None, 0.0]),
        "sampler/logprob_diff_mean": ([1], [1e-3]),
    }
    found = {m["tag"]: m for m in health({"dtype": "bfloat16"}, metrics)}
    truncated = found["train/truncated_fraction"]
    assert (truncated["worrying"], truncated["worst"], truncated["at"]) == (2, 0.2, 2)
    assert found["sampler/logprob_diff_mean"]["worrying"] == 0
    [gap] = [m for m in health({"dtype": "float32"}, metrics) if m["unit"] == "nats"]
    assert gap["worrying"] == 1
    assert "train/skipped_updates" not in found


def test_the_seconds_of_a_run_add_up():
    metrics = {"time/step": ([1, 2], [3.0, 3.0]), "time/generation": ([1, 2], [1.0, 1.5]),
               "time/evaluation": ([2], [4.0])}  # fmt: skip
    assert where_time_went(metrics) == {"generation": 2.5, "other": 3.5, "evaluation": 4.0}
    beside = {"waiting": [1.0, 0.5], "sampler_idle": [2.0, 1.5], "useful_tokens_per_s": [9.0, 9.0]}
    metrics |= {f"time/{name}": ([1, 2], values) for name, values in beside.items()}
    assert where_time_went(metrics) == {"generation": 2.5, "other": 3.5, "evaluation": 4.0}
    metrics |= {"staleness/steps": ([1, 2], [0.0, 1.0])}
    assert where_time_went(metrics) == {"waiting": 1.5, "other": 4.5, "evaluation": 4.0}


# -- the reports, and the page as a file ------------------------------------------------------


def test_a_report_s_own_markup_is_text_and_its_pictures_are_inside(tmp_path):
    run = a_run(tmp_path / "study/v/seed_0")
    (tmp_path / "study/curves.png").write_bytes(b"png")
    (tmp_path / "study/report.md").write_text(
        "# T\n\n<script>1</script> [x](javascript:alert(1))\n\n"
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
        "\n![c](curves.png) ![d](../secret.png)\n"
    )
    runs = given([tmp_path / "study"])
    assert runs.folders == [run]
    html = runs.report(0)["html"]
    assert "<table>" in html
    assert "data:image/png;base64,cG5n" in html
    assert "<script" not in html
    assert 'href="javascript' not in html


def test_the_file_holds_the_asked_steps_and_no_completion_as_markup(tmp_path):
    run = a_run(tmp_path / "a")
    write_rollouts(run, 2, [completion(HOSTILE, HOSTILE, right=False, advantage=0.0)])
    out = write(given([run]), tmp_path / "page.html", [2])
    html = out.read_text()
    assert "window.broken" in html
    assert "<script>window.broken" not in html
    data = html.split('id="answers">')[1].split("</script>")[0]
    answers = json.loads(data)
    assert {path for path in answers if path.startswith("/api/step")} == {"/api/step?run=0&step=2"}
    assert answers["/api/completion?run=0&step=2&row=0"]["completion"] == HOSTILE
    outside = re.sub(r"<script.*?</script>|<style.*?</style>|<meta.*?>", "", html, flags=re.S)
    assert re.findall(r"""(?:src|href|url)\W+([^"')]+)""", outside) == ["data:,"]


def test_the_file_has_the_first_the_middle_and_the_last_step_unless_asked(tmp_path):
    runs = given([a_run(tmp_path / "a", n_steps=5)])
    write(runs, tmp_path / "page.html")
    assert runs.steps == {1, 3, 5}
    with pytest.raises(InputError, match="--steps 9: no run has its completions; there are 1 to 5"):
        write(runs, tmp_path / "page.html", [9])
    with pytest.raises(InputError, match="--out"):
        write(runs, tmp_path, [1])
    assert '"whole": false' in sheet(runs)


# -- size -------------------------------------------------------------------------------------


def test_a_step_of_256_completions_of_1024_tokens_stays_small(tmp_path):
    """Opening reads no completion at all; then one step is parsed, a line at a time."""
    run = a_run(tmp_path / "a")
    row = completion("p", "7." * 2000, right=False, advantage=0.0)
    row |= {"token_ids": [3] * 1024, "sampler_logprobs": [-0.123456789012345] * 1024}
    write_rollouts(run, 1, [row] * 256)
    runs = Runs([run])
    tracemalloc.start()
    runs.overview()
    opened = tracemalloc.get_traced_memory()[1]
    assert len(runs.step(0, 1)["rows"]) == 256
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 2e6
    assert largest < 10e6
