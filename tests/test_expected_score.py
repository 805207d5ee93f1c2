"""The expected score of a judgement is that of a loop over whole continuations, by transformers' own probabilities."""

import json

import numpy as np
import pytest

from patarm_jax.cli import main
from patarm_jax.config.sections import MeshSection, ModelSection
from patarm_jax.data.tokenizer import load_tokenizer
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.model import weights
from patarm_jax.model.sharding import ROLLOUT_RULES, make_mesh
from patarm_jax.rollout.probabilities import SCORES, expectation, expected_scores, make_logprobs, unscored
from tests.toys import hf_model, small_world, tiny_tokenizer_folder

FORM = "<think>Hm.</think><generate_rubrics>Wit</generate_rubrics><eval>Dull.</eval><answer>{}</answer>{}"
JUDGEMENTS = [("7", ""), ("10", ""), ("3.5", " and more"), (" 8 ", "\n")]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A model of transformers' with a tokenizer, and what some judgements are to it."""
    folder = tiny_tokenizer_folder(tmp_path_factory.mktemp("expected") / "judge")
    model = hf_model(seed=2, vocab_size=512, max_position_embeddings=512)
    model.save_pretrained(folder)
    return folder, model


def judgements_of(tokenizer):
    """(prompt, what was written, the judgement) of each; also of one whose tag ends in the middle of a token."""
    rng = np.random.default_rng(0)
    for answer, behind in JUDGEMENTS:
        text = FORM.format(answer, behind)
        ids = tokenizer.plain.encode(text, add_special_tokens=False).ids
        yield rng.integers(3, 90, int(rng.integers(4, 30))).astype(np.int32), ids, parse_pointwise(text)


def loop(model, tokenizer, prompt, text):
    """The expected score and what is outside, one continuation and one token at a time."""
    import torch

    before = text[: text.rindex("<answer>") + len("<answer>")]
    prefix = [*prompt.tolist(), *tokenizer.plain.encode(before, add_special_tokens=False).ids]
    probabilities = []
    for score in SCORES:
        total = 0.0
        ids = list(prefix)
        for token in tokenizer.plain.encode(f"{score}</answer>", add_special_tokens=False).ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            total += torch.log_softmax(logits.double(), -1)[token].item()
            ids.append(token)
        probabilities.append(np.exp(total))
    probabilities = np.array(probabilities)
    return (probabilities * SCORES).sum() / probabilities.sum(), 1 - probabilities.sum()


@pytest.mark.parametrize("mesh", [MeshSection(), MeshSection(data=2, fsdp=2, tensor=2)], ids=["fsdp", "cube"])
def test_it_equals_a_loop_over_whole_continuations(judge, mesh):
    folder, model = judge
    tokenizer, mesh = load_tokenizer(folder), make_mesh(mesh)
    params, arch = weights.load(folder, mesh, ROLLOUT_RULES, unstacked=True)
    every = list(judgements_of(tokenizer))
    ones = [unscored(tokenizer, *one) for one in every]
    logprobs = make_logprobs(arch, mesh, ModelSection(dtype="float32"))
    found = list(expected_scores(logprobs, params, mesh, ones))
    assert len(found) == len(every)
    for one, (prompt, _, judgement) in zip(found, every, strict=True):
        score, outside = loop(model, tokenizer, prompt, judgement.text)
        assert one.score == pytest.approx(score, rel=1e-4) and one.outside == pytest.approx(outside, abs=1e-5)
    assert np.ptp([one.score for one in found]) > 1e-3  # they differ by what stands before them


def test_what_cannot_be_read_has_none(judge):
    tokenizer = load_tokenizer(judge[0])
    prompt = np.arange(4, dtype=np.int32)
    for text in ("<think>no end", FORM.format("8/10", ""), FORM.format("11", "")):
        ids = tokenizer.plain.encode(text, add_special_tokens=False).ids
        assert unscored(tokenizer, prompt, ids, parse_pointwise(text)) is None


def test_a_tag_that_ends_inside_a_token_is_written_out(real_inputs):
    """The token is left out of the prefix, and its beginning stands before every score."""
    tokenizer = load_tokenizer(real_inputs / "qwen3_tokenizer")
    text = FORM.format("\n7\n", "")
    end = text.rindex("<answer>") + len("<answer>")
    ids = tokenizer.plain.encode(text, add_special_tokens=False).ids
    one = unscored(tokenizer, np.arange(3, dtype=np.int32), ids, parse_pointwise(text))
    kept = one.prefix[3:].tolist()
    assert ids[: len(kept)] == kept and tokenizer.fast.decode(ids[len(kept)]) == ">\n"
    for score, continuation in zip(SCORES, one.continuations, strict=True):
        said = tokenizer.fast.decode([*kept, *continuation])
        assert said == text[:end] + f"{score}</answer>"


def test_scores_are_whole_continuations_of_qwen3s_tokens(real_inputs):
    """10 is two tokens, and 1 begins it: what comes behind tells them apart."""
    tokenizer = load_tokenizer(real_inputs / "qwen3_tokenizer")
    text = FORM.format("7", "")
    ids = tokenizer.plain.encode(text, add_special_tokens=False).ids
    one = unscored(tokenizer, np.array([5, 6], np.int32), ids, parse_pointwise(text))
    assert list(one.prefix) + list(one.continuations[7]) == [5, 6, *ids]
    assert [len(each) for each in one.continuations] == [len(one.continuations[0])] * 10 + [
        len(one.continuations[0]) + 1
    ]
    assert one.continuations[10][0] == one.continuations[1][0] and len(set(one.continuations)) == 11


def test_probabilities_add_up_to_one_with_what_is_outside():
    found = expectation(np.log(np.array([0.01] * 5 + [0.2, 0.1, 0.05, 0.1, 0.05, 0.15])))
    weights = [0.01] * 5 + [0.2, 0.1, 0.05, 0.1, 0.05, 0.15]
    assert found.outside == pytest.approx(1 - sum(weights))
    assert found.score == pytest.approx(sum(s * w for s, w in zip(SCORES, weights, strict=True)) / sum(weights))
    unlikely = expectation(np.full(11, -2000.0))  # no number underflows
    assert unlikely.score == pytest.approx(5.0) and unlikely.outside == 1.0


def test_scores_of_another_kind_are_not_mixed(tmp_path, capsys):
    """Random weights write nothing that can be read: nothing is expected of it, and the answers are told apart."""
    world = small_world(tmp_path)
    command = [
        "judge",
        str(world / "model"),
        "--input",
        str(world / "pairs.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
    ]
    command += ["--model.weights", "random", "--model.dtype", "float32", "--sampling.max_new_tokens", "8"]
    assert main([*command, "--expected-score"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all("drawn" not in one for row in rows for one in row["judgements"]["chosen"])
    assert main(command) == 1
    assert "holds scores of another judge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--judge", "pairwise", "--model", "somewhere"], "a pairwise judge writes no score from 0 to 10"),
        (["--endpoint.url", "http://127.0.0.1:9/v1"], "a server does not say how likely whole scores are"),
    ],
)
def test_where_there_are_no_probabilities_they_are_refused(tmp_path, capsys, arguments, said):
    command = ["eval", "pairs", "--data", "pairs.jsonl", "--output", str(tmp_path / "out"), "--expected-score"]
    assert main([*command, *arguments]) == 2
    assert said in capsys.readouterr().err
