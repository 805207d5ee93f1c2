"""What a run's metrics say about whether it learns, over a table of runs."""

import itertools
import json
from dataclasses import replace

import pytest

from patarm_jax.config.recipes import SFTConfig
from patarm_jax.run.health import Health, Told, after, parted, reason_to_stop, symptoms, verdict, warnings
from patarm_jax.run.watch import open_watch

TOLD = Told("runs/x", 1e30, "bfloat16", max_new_tokens=64, heldout_new_tokens=32)
SFT = {"loss": 1.0, "learning_rate": 0.1, "skipped_updates": 0}
GOOD = SFT | {
    "judge/valid": 0.9, "completions/clipped_ratio": 0.1, "judge/pairs_without_par": 0.1, "rewards/par/mean": 0.6,
    "advantages/abs_mean": 0.7,
}  # fmt: skip
CUT = GOOD | {"judge/valid": 0.0, "completions/clipped_ratio": 1.0, "judge/pairs_without_par": 1.0,
              "rewards/par/mean": 0.0, "advantages/abs_mean": 0.0}  # fmt: skip
MUTE = CUT | {"completions/clipped_ratio": 0.5}
LONELY = MUTE | {"judge/valid": 0.1}
WRONG = LONELY | {"judge/pairs_without_par": 0.0}
EQUAL = GOOD | {"advantages/abs_mean": 0.0}
CHANCE = GOOD | {"judge/accuracy_strict": 0.5, "judge/accuracy_half": 0.5}


def run(lines, updates=1, begun=None):
    """The healths of a run, before its first step and after each."""
    found = [begun or Health()]
    for line in lines:
        found.append(after(found[-1], line, updates))
    return found


def skipping(totals):
    return [SFT | {"skipped_updates": total} for total in totals]


STEPS = {
    "good": (GOOD, 0, []),
    "at chance": (CHANCE, 0, []),
    "of SFT": (SFT, 0, []),
    "all cut off": (CUT, 0, ["cut_off"]),
    "rubrics cut off, and judged by": (GOOD | {"completions/clipped_ratio": 1.0}, 0, []),
    "nothing readable": (MUTE, 0, ["unreadable"]),
    "never both sides": (LONELY, 0, ["no_pair"]),
    "never on the right side": (WRONG, 0, ["no_reward"]),
    "all alike": (EQUAL, 0, ["no_advantage"]),
    "all alike, and skipped": (EQUAL, 1, ["skipped", "no_advantage"]),
    "null where nothing was measured": (GOOD | {"rewards/par/mean": None}, 0, []),
    "held out, cut off": (SFT | {"eval/valid": 0.0, "eval/clipped_ratio": 1.0}, 0, ["eval_cut_off"]),
    "held out, unreadable": (SFT | {"eval/valid": 0.0, "eval/clipped_ratio": 0.9}, 0, ["eval_mute"]),
    "held out, readable": (SFT | {"eval/valid": 0.1, "eval/clipped_ratio": 0.9}, 0, []),
}


@pytest.mark.parametrize(("line", "skipped", "expected"), STEPS.values(), ids=STEPS.keys())
def test_a_step_shows_its_cause_and_not_what_follows_from_it(line, skipped, expected):
    assert symptoms(line, skipped) == expected


VERDICTS = {
    "no step": ([], ""),
    "a good run": ([GOOD] * 3, ""),
    "a run at chance": ([CHANCE] * 3, ""),
    "one step of three": ([CUT, MUTE, GOOD], ""),
    "sft": ([SFT] * 3, ""),
    "sft, held-out pairs unreadable": ([SFT | {"eval/valid": 0.0}] * 3, ""),
    "sft, one update taken": (skipping([0, 1, 2]), ""),
    "all skipped": (skipping([1, 2, 3]), "nothing was learnt: 3 of 3 updates were skipped"),
    "no rate": ([SFT | {"learning_rate": 0.0}], "nothing was learnt: the learning rate was 0 in each of the 1 steps"),
    "cut off": ([CUT] * 3, "in 3 of 3 steps all that was written was cut off at the limit. All cut off: raise samp"),
    "unreadable": ([MUTE] * 2, "but the format penalty was learnt: in 2 of 2 steps no judgement could be read. Teach"),
    "lonely": ([LONELY] * 2, "nothing but the format penalty was learnt: in 2 of 2 steps no pair had a readable"),
    "wrong": ([WRONG] * 2, "in 2 of 2 steps no judgement earned a PAR reward, though both sides could be read. Either"),
    "equal": ([EQUAL] * 2, "nothing was learnt: in 2 of 2 steps all that is compared with each other earned the same"),
    "of everything a bit": (
        [CUT, MUTE, MUTE, LONELY],
        "in 2 of 4 steps no judgement could be read; in 1 of 4 steps all",
    ),
}


@pytest.mark.parametrize(("lines", "words"), VERDICTS.values(), ids=VERDICTS.keys())
def test_a_run_in_which_nothing_was_learnt_is_told(lines, words):
    said = verdict(run(lines)[-1], TOLD)
    assert words in said and bool(words) == bool(said)


def test_the_advice_names_the_setting_and_its_value():
    said = {name: verdict(run([line])[-1], TOLD) for name, line in (("cut", CUT), ("skip", skipping([1])[0]))}
    assert "raise sampling.max_new_tokens, which is 64" in said["cut"]
    assert "optimizer.learning_rate, 1e+30, is too high: lower it, or set model.dtype to float32." in said["skip"]
    assert "dtype" not in verdict(run(skipping([1]))[-1], replace(TOLD, dtype="float32"))


def test_what_goes_on_is_said_ever_less_often():
    healths = run([CUT] * 20)
    said = [step for step in range(1, 21) if warnings(healths[step - 1], healths[step], TOLD)]
    assert said == [1, 2, 4, 8, 16]
    assert warnings(healths[7], healths[8], TOLD)[0].startswith("in 8 of 8 steps all that was written was cut off")
    assert not any(warnings(*pair, TOLD) for pair in itertools.pairwise(run([GOOD] * 5)))


def test_several_symptoms_are_said_each():
    before, now = run([MUTE | {"skipped_updates": 1, "eval/valid": 0.0}])
    assert len(warnings(before, now, TOLD)) == 3


@pytest.mark.parametrize(("totals", "updates", "stops"), [
    ([1, 2, 3], 1, 3),
    ([1, 2, 2, 3, 4, 5], 1, 6),  # one that is taken begins the count anew
    ([2, 4], 2, 2),
    ([1, 2, 3, 4], 2, None),  # one of the two updates of each step is taken
    ([0, 0, 0], 1, None),
])  # fmt: skip
def test_updates_skipped_in_a_row_stop_a_run(totals, updates, stops):
    healths = run(skipping(totals), updates)
    told = replace(TOLD, max_skipped=3, updates_per_step=updates)
    reasons = [reason_to_stop(before, now, told) for before, now in itertools.pairwise(healths)]
    assert next((i for i, reason in enumerate(reasons, 1) if reason), None) == stops
    if stops:
        assert "updates in a row were skipped, and run.max_skipped is 3: " in reasons[stops - 1]


def test_the_first_skipped_update_stops_a_run_that_asks_for_it():
    told = replace(TOLD, on_nonfinite="stop")
    healths = run(skipping([0, 1, 1]))
    reasons = [reason_to_stop(before, now, told) for before, now in itertools.pairwise(healths)]
    assert [bool(reason) for reason in reasons] == [False, True, False]
    assert reasons[1].startswith("run.on_nonfinite is stop, and 1 of 2 updates were skipped")


def test_the_watch_of_a_phase_counts_what_was_skipped_in_it_alone(tmp_path):
    """Of a model whose optimizer, and with it the count, goes on from an earlier phase, another one's lines between."""
    lines = [("judge", 1, 2), ("generator", 1, 5), ("judge", 2, 2), ("judge", 2, 3)]
    rows = [
        SFT | {"step": step, "phase": phase, "round": number, "skipped_updates": skipped, "num_tokens": 7 * step}
        for step, (phase, number, skipped) in enumerate(lines, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, labels = SFTConfig(), {"phase": "judge", "round": 2}
    kept = open_watch(config, tmp_path, 4, per_epoch=2, before_it=2, labels=labels, counts_on={"phase": "judge"})
    assert (kept.health.steps, kept.health.skipped, kept.health.in_a_row, kept.tokens) == (2, 1, 1, 28)
    anew = open_watch(config, tmp_path, 4, per_epoch=2, before_it=2, labels=labels)
    assert (anew.health.steps, anew.health.skipped, anew.health.in_a_row) == (2, 3, 1)
    assert kept.verdict == "" and anew.verdict == ""


def test_the_settings_of_one_of_two_models_are_named_as_its_own():
    its = replace(TOLD, settings="generator.")
    assert "raise generator.sampling.max_new_tokens, which is 64" in verdict(run([CUT])[-1], its)
    assert "Raise generator.sampling.temperature or generator.group_size" in verdict(run([EQUAL])[-1], its)


def test_a_reward_that_rises_while_gold_falls_is_told():
    """By more than twice the standard error of the difference; a measure that says nothing is passed over."""

    def lines(*gold, error=0.01):
        return [
            {"step": float(step), "eval/reward": float(step), "gold/right/mean": value, "gold/right/error": error,
             "gold/mute/mean": None}
            for step, value in enumerate(gold, 1)
        ]  # fmt: skip

    said = parted(lines(0.4, 0.6, None, 0.5))
    assert said.startswith("from step 2 to 4 the reward on the held-out prompts rose by 2 while gold/right fell by 0.1")
    assert parted(lines(0.4, 0.6, 0.5, error=0.05)) == ""  # within what chance does
    assert parted(lines(0.4, 0.5, 0.6)) == parted(lines(None, None)) == parted([{"step": 1.0}]) == ""
    falling = [line | {"eval/reward": -line["step"]} for line in lines(0.6, 0.4)]
    assert parted(falling) == ""  # both fall: nobody is fooled
