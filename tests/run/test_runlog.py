"""What a run tells is right, whole after a crash, and safe to show."""

import io
import json
import re
import threading

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from tiny_run import curves

from jgrpo.config import Config
from jgrpo.errors import RunError, exit_status, printable
from jgrpo.run.runlog import RunLog
from jgrpo.run.terminal import (
    ACCURACY,
    COLUMNS,
    KL,
    REWARD,
    StepLines,
    TimeLeft,
    bars,
    clock,
    columns_of,
)

STEP = {
    "train/accuracy": 0.5,
    "train/reward_mean": 0.25,
    "train/avg_gen_length": 34.2,
    "train/approx_kl": 0.0012,
    "train/grad_norm": 0.82,
    "sampler/logprob_diff_mean": 3e-7,
    "tokens/generated": 824,
    "time/step": 3.0,
    "time/compile": 1.0,
    "train/zero_advantage_fraction": 0.25,
    "train/truncated_fraction": 0.125,
    "train/entropy": 0.5,
}
EVERY = (ACCURACY, REWARD, KL, *COLUMNS)
EVALUATION = {"eval/accuracy": 0.71, "eval/correct": 71, "eval/total": 100}


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, force_terminal=True)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_and_an_evaluation_on_its_own(tmp_path):
    with RunLog(tmp_path, 2, console=plain()) as log:
        log.log(1, {"train/loss": np.float32(0.5), "tokens/trained": np.int64(7)} | EVALUATION)
        assert lines(tmp_path) == [  # on the disk before the run ends
            {"step": 1, "train/loss": 0.5, "tokens/trained": 7},
            {"step": 1, **EVALUATION},
        ]


def test_nan_and_infinity_are_null_in_valid_json(tmp_path):
    with RunLog(tmp_path, 1, console=plain()) as log:
        log.log(1, {"train/loss": float("nan"), "train/grad_norm": np.float32("inf"), "a": 1.0})
    assert lines(tmp_path) == [{"step": 1, "train/loss": None, "train/grad_norm": None, "a": 1.0}]
    assert curves(tmp_path) == {("a", 1): [1.0]}


def test_tensorboard_holds_the_same_tags_and_values(tmp_path):
    with RunLog(tmp_path, 3, console=plain()) as log:
        log.log(3, STEP)
        log.log(3, EVALUATION)
    expected = {(tag, 3): [pytest.approx(v, rel=1e-6)] for tag, v in (STEP | EVALUATION).items()}
    assert curves(tmp_path) == expected


def test_resume_forgets_later_steps_and_a_torn_line_in_both_places(tmp_path):
    with RunLog(tmp_path, 4, console=plain()) as log:
        log.log(0, {"eval/accuracy": 0.1})
        for step in (1, 2, 3):
            log.log(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    with RunLog(tmp_path, 4, resume_step=2, console=plain()) as log:
        log.log(3, {"train/loss": 30.0})
    assert [(r["step"], r.get("train/loss")) for r in lines(tmp_path)] == [
        (0, None),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2  # the first is not overwritten
    assert curves(tmp_path) == {
        ("eval/accuracy", 0): pytest.approx([0.1]),
        ("train/loss", 1): [1.0],
        ("train/loss", 2): [2.0],
        ("train/loss", 3): [30.0],
    }
    assert not list(tmp_path.glob(".*"))


def test_a_point_that_only_tensorboard_lacks_comes_with_the_resume(tmp_path):
    """A kill between the two logs; the step's checkpoint was written in an earlier life."""
    with RunLog(tmp_path, 4, console=plain()) as log:
        log.log(2, {"train/loss": 2.0})
        log._file.write(b'{"step": 2, "eval/accuracy": 0.5}\n')
    with RunLog(tmp_path, 4, resume_step=2, console=plain()) as log:
        pass
    assert curves(tmp_path) == {("train/loss", 2): [2.0], ("eval/accuracy", 2): [0.5]}


def test_what_is_logged_is_on_the_disk_in_both_places(tmp_path):
    with RunLog(tmp_path, 1, console=plain()) as log:
        for step in (1, 2):
            log.log(step, {f"train/{n}": float(n * step) for n in range(1, 31)})
            assert len(lines(tmp_path)) == step
        assert len(curves(tmp_path)) == 60


def test_the_step_line_shows_the_metrics_under_their_titles(tmp_path):
    console = plain(120)
    with RunLog(tmp_path, 50, columns=EVERY, console=console) as log:
        log.log(12, STEP)
        log.log(13, {"train/accuracy": 1.0})
        log.log(13, EVALUATION)
    *_, title, row, bare, evaluation = shown(console).splitlines()
    assert dict(zip(title.split(), row.split(), strict=True)) == {
        "step": "12/50",
        "acc": "0.500",
        "reward": "0.250",
        "kl": "1.2e-03",
        "len": "34.2",
        "gap": "3.0e-07",
        "|grad|": "0.82",
        "time": "3.0s",
        "tok/s": "412",  # 824 tokens in the 2 s that were not compilation
        "flat": "0.25",
        "cut": "0.12",
        "entropy": "0.500",
    }
    assert bare.split() == ["13/50", "1.000"] + 10 * ["-"]
    assert evaluation == "eval at step 13: accuracy 0.710 (71/100)"
    assert len({len(line) for line in (title, row, bare)}) == 1


def test_a_column_is_there_where_it_can_say_something():
    titles = lambda **changes: [c.title for c in columns_of(Config(**changes))]  # noqa: E731
    assert not {"reward", "kl", "clip"} & set(titles(use_clip=True, use_kl_penalty=True))
    for shaped in ({"use_prm": True}, {"use_length_penalty": True}, {"reward_function": "a:b"}):
        assert titles(**shaped)[:2] == ["acc", "reward"]
    assert "kl" in titles(epochs_per_step=2)
    assert "clip" not in titles(epochs_per_step=2)
    assert {"kl", "clip"} < set(titles(updates_per_epoch=2, use_clip=True))


def test_at_80_columns_a_run_of_100_steps_shows_all_that_the_default_has():
    lines = StepLines(columns_of(Config()), 100, 80)
    assert lines.title().split()[1:] == [c.title for c in columns_of(Config())]


@pytest.mark.parametrize("width", [30, 80])
def test_no_line_is_wider_than_the_terminal(tmp_path, width):
    console = plain(width)
    with RunLog(tmp_path, 10_000, columns=EVERY, console=console) as log:
        log.log(10_000, STEP)
    rows = shown(console).splitlines()
    assert rows[-1].split()[:2] == ["10000/10000", "0.500"]
    assert all(len(row) <= width for row in rows)


def test_without_a_terminal_there_are_no_control_codes_and_no_bars(tmp_path):
    console = plain()
    with RunLog(tmp_path, 1, console=console) as log:
        with log.screen.phase("generation", total=2) as advance:
            advance(2, 10)
        log.info("x" * 300)
        log.log(1, STEP)
    assert "\x1b" not in shown(console)
    assert "generation" not in shown(console)
    assert "x" * 300 in shown(console)  # a log file is not wrapped


def test_on_a_terminal_the_phase_has_a_bar_with_its_rate(tmp_path):
    console = terminal()
    with (
        RunLog(tmp_path, 3, console=console) as log,
        log.screen.phase("generation", total=8) as advance,
    ):
        advance(4, 100)
        log.info("in between")
    for text in ("steps", "0/3", "generation", "4/8", "tok/s", "in between"):
        assert text in shown(console)


def test_phases_add_up_until_taken_even_when_they_fail(tmp_path):
    with RunLog(tmp_path, 1, console=plain()) as log:
        with log.screen.phase("reward"):
            pass
        first = log.screen.seconds["reward"]
        with pytest.raises(KeyError), log.screen.phase("reward"):
            raise KeyError
        assert log.screen.seconds["reward"] > first > 0
        taken = log.screen.take_seconds()
        assert set(taken) == {"time/reward", "time/compile"}
        assert log.screen.take_seconds() == {}


def test_the_bars_are_as_wide_as_the_terminal_and_every_column_keeps_its_place():
    """Whatever a phase is called, counts or compiles."""
    frames = []
    for width in (80, 120):
        for name, total, done, tokens, program in (
            ("generation", 256, 7, 12_345, ""),
            ("a name that is far too long", None, 0, 0, "update (16 prompts x 1024, 64 rows x 8)"),
            ("reward", 100_000, 99_999, 1, ""),
        ):
            console = terminal(width)
            shown_bars = bars(console, True, lambda program=program: program)
            steps = shown_bars.add_task("steps", total=1000, completed=9)
            shown_bars.update(steps, left_s=7265.0, since=shown_bars.get_time())
            task = shown_bars.add_task(name, total=total, completed=done, tokens=tokens)
            shown_bars.tasks[task].start_time -= 100
            with console.capture() as capture:
                console.print(shown_bars.make_tasks_table(shown_bars.tasks), no_wrap=True)
            text = Text.from_ansi(capture.get()).plain
            two = text.splitlines()
            assert [len(line) for line in two] == [width] * 2
            bar = [re.search("[━╸╺]+", line).span() for line in two]
            assert bar[0] == bar[1]
            frames.append((width, bar[0], two[0][bar[0][1] :]))
    assert len(set(frames)) == 2  # one a width: nothing has moved
    (_, (start, end), rest), _ = frames[0], frames[-1]
    assert end - start >= 12
    assert rest.split() == ["9/1000", "0:00", "2:01:05", "left"]


def test_the_time_left_follows_recent_steps_without_what_was_compiled():
    left = TimeLeft(43)
    slow = {"time/step": 71.0, "time/compile": 69.0}  # 2 s of its own
    assert left.after_step(1, slow) == 42 * 2
    left.after_step(2, slow)
    assert left.after_step(3, {"time/step": 2.0, "time/compile": 0.0}) == 40 * 2
    assert left.after_evaluation(3, {"time/evaluation": 3.0}) == 40 * (2 + 2 + 2 + 3) / 3
    for step in range(4, 24):
        seconds = left.after_step(step, {"time/step": 5.0})
    assert seconds == 20 * 5  # the first ones are forgotten


def test_the_time_left_is_not_known_before_a_step():
    assert TimeLeft(3).after_evaluation(0, {"time/evaluation": 3.0}) is None


@pytest.mark.parametrize(("seconds", "shows"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_a_clock(seconds, shows):
    assert clock(seconds) == shows


def test_progress_from_many_threads_is_not_lost(tmp_path):
    with (
        RunLog(tmp_path, 1, live=False, console=plain()) as log,
        log.screen.phase("generation", total=4000) as advance,
    ):
        threads = [
            threading.Thread(target=lambda: [advance(1, 3) for _ in range(500)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        task = log.screen._progress.tasks[-1]
        assert (task.completed, task.fields["tokens"]) == (4000, 12000)


def test_text_of_the_data_cannot_steer_the_terminal(tmp_path):
    hostile = "[bold]x[/bold] \x1b[2J\r\x07\u202e\x9b :smile: a\nb"
    assert printable(hostile) == (r"[bold]x[/bold] \x1b[2J\r\x07\u202e\x9b :smile: a" + "\nb")
    assert printable("é√2", "ascii") == r"\xe9\u221a2"
    console = plain()
    with RunLog(tmp_path, 1, console=console) as log:
        log.info(hostile)
    assert shown(console) == printable(hostile) + "\n"


def test_an_error_that_quotes_a_server_cannot_steer_the_terminal(capsys):
    with pytest.raises(SystemExit), exit_status():
        raise RunError("http://server: \x1b]0;owned\x07 \x1b[2J")
    assert capsys.readouterr().err == r"error: http://server: \x1b]0;owned\x07 \x1b[2J" + "\n"


def test_a_disk_that_takes_a_part_of_a_line_is_told_of(tmp_path):
    class NearlyFull(io.RawIOBase):
        room = 5

        def write(self, data):
            taken, self.room = min(self.room, len(data)), 0
            if not taken:
                raise OSError(28, "No space left on device")
            return taken

    with RunLog(tmp_path, 1, console=plain()) as log:
        log._file.close()
        log._file = NearlyFull()
        with pytest.raises(RunError, match=r"No space left"):
            log.log(1, {"train/loss": 1.0})


@pytest.mark.parametrize("every", [0, 2])
def test_the_log_shows_a_right_and_a_wrong_completion_every_so_many_steps(tmp_path, every):
    console = plain(100)
    texts = {True: "it is \\boxed{7}\x1b[2J", False: "x" * 5000}
    rows = [
        {"problem": "3 + 4?", "gold": "7", "completion": texts[right], "token_ids": [1, 2],
         "reward": float(right), "reward_parts": {"outcome": float(right)}, "advantage": 0.5,
         "finish_reason": "stop"}
        for right in (False, True, True, False)
    ]  # fmt: skip
    with RunLog(tmp_path, 9, config=Config(show_every=every), console=console) as log:
        for step in (1, 2, 3):
            log.log(step, STEP, rows)
    text = shown(console)
    assert re.findall(r"step (\d) +gold 7", text) == ["2"] * (every > 0)
    assert text.count("3 + 4?") == text.count(r"it is \boxed{7}\x1b[2J") == (every > 0)
    assert text.count("x" * 300) == 2 * (every > 0)  # of 5,000 both ends
    assert "\x1b" not in text


def test_a_full_disk_is_one_message(tmp_path):
    class Full(io.RawIOBase):
        def write(self, data):
            raise OSError(28, "No space left on device")

    with RunLog(tmp_path, 1, console=plain()) as log:
        log._file.close()
        log._file = Full()
        with pytest.raises(RunError, match=r"metrics cannot be written.*No space left"):
            log.log(1, {"train/loss": 1.0})
