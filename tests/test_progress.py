"""How far a command has come is said with units, and so that it is plain which steps a number belongs to."""

import io

from patarm_jax.run.progress import progress


def lines_of(steps, done, seconds, tokens=0, unit="step", every=20):
    """What is printed where nobody watches."""
    now, stream, written = [0.0], io.StringIO(), 0
    with progress(steps, done, unit=unit, every=every, stream=stream, clock=lambda: now[0]) as report:
        for step in range(done + 1, steps + 1):
            now[0] += seconds(step)
            written += tokens
            report(step, {"loss": 1.234 if step < steps else 0.0001234, "cut off": "3 %"}, written)
    return stream.getvalue().splitlines()


def test_lines_without_a_terminal():
    lines = lines_of(200, 8, lambda step: 40 if step == 9 else 2.1)
    assert lines[:3] == [
        "step 9/200  loss 1.234  cut off 3 %  the first in 40 s",
        "step 19/200  loss 1.234  cut off 3 %  since step 9: 2.1 s/step  6 min left",
        "step 29/200  loss 1.234  cut off 3 %  since step 19: 2.1 s/step  6 min left",
    ]
    assert lines[-2:] == [
        "step 200/200  loss 0.0001234  cut off 3 %  since step 199: 2.1 s/step  0 s left",
        "192 steps in 7 min: 2.3 s/step over all of them",
    ]
    assert len(lines) == 1 + 19 + 1 + 1


def test_tokens_are_those_of_the_same_steps_as_the_time():
    lines = lines_of(3, 0, lambda step: 10.0 * step, tokens=1500, every=0)
    assert lines[0].endswith("the first in 10 s")
    assert lines[1].endswith("since step 1: 20 s/step, 75 tokens/s  20 s left")
    assert lines[2].endswith("since step 2: 30 s/step, 50 tokens/s  0 s left")
    assert lines[3] == "3 steps in 60 s: 20 s/step, 75 tokens/s over all of them".replace("60 s", "1 min")


def test_what_is_quick_has_a_rate():
    assert lines_of(100, 0, lambda step: 0.05, unit="question")[-1] == (
        "100 questions in 5 s: 20 questions/s over all of them"
    )


def test_one_step_is_not_told_twice():
    assert len(lines_of(5, 4, lambda step: 1.0)) == 1


def test_what_was_stopped_says_what_it_did():
    now, stream = [0.0], io.StringIO()
    with progress(100, stream=stream, clock=lambda: now[0]) as report:
        for step in range(1, 4):
            now[0] += 2.0
            report(step, {}, 100 * step)
    assert stream.getvalue().splitlines()[-1] == "3 steps in 6 s: 2 s/step, 50 tokens/s over all of them"


def test_a_terminal_has_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress(200, 10, stream=stream) as report:
        report(11, {"loss": 1.23456, "cut off": "12 %"})
        report(13, {"loss": 1.23456, "cut off": "12 %"})
    bar, last = stream.getvalue().rstrip().split("\r")[-1].splitlines()
    assert "13/200" in bar and "loss 1.235  cut off 12 %" in bar and "step" in bar
    assert last.startswith("3 steps in 0 s: ")
