"""Chat templates that open the thinking, and those that leave it to the judge: what is taught, sampled and read."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import transformers
import yaml

from patarm_jax.data.pipeline import encode_question
from patarm_jax.data.tokenizer import decode, encode_chat, encode_judgement, load_tokenizer, written
from patarm_jax.judge.forms import ORDINAL
from patarm_jax.judge.parse import parse_baseline, parse_pairwise, parse_pointwise
from patarm_jax.judge.prompts import baseline, ordinal, pairwise, pointwise
from patarm_jax.rollout.judging import read_judgements
from patarm_jax.rollout.schedule import Group
from patarm_jax.types import Status, UserError
from tests.chat_server import ENVIRONMENT
from tests.toys import tiny_model_folder

LEFT, OPENED = "<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n"
JUDGEMENT = "<think>\nHm.\n</think>\n\n<generate_rubrics>Wit</generate_rubrics>\n<eval>ok</eval>\n<answer>{}</answer>"


def with_template(folder, ending):
    """The folder with a chat template that ends a prompt with these words, as Qwen3's and Qwen3-Thinking's do."""
    path = folder / "chat_template.jinja"
    template = path.read_text()
    at = template.rindex("if add_generation_prompt")
    changed = template[:at] + template[at:].replace(LEFT, ending, 1)
    assert ending in changed
    path.write_text(changed)
    return folder


@pytest.fixture(scope="module")
def folders(real_inputs, tmp_path_factory):
    """The real Qwen3 tokenizer with a template of either kind."""
    root = tmp_path_factory.mktemp("qwen")
    for name, ending in (("left", LEFT), ("opened", OPENED)):
        shutil.copytree(real_inputs / "qwen3_tokenizer", root / name)
        (root / name / "Qwen3-4B.config.json").rename(root / name / "config.json")
        (root / name / "Qwen3.generation_config.json").rename(root / name / "generation_config.json")
        with_template(root / name, ending)
    return root


ASKED = {
    "pointwise": (pointwise("2 + 2?", "4", "math"), parse_pointwise, "9"),
    "pairwise": (pairwise("2 + 2?", "4", "5", "math"), parse_pairwise, "A"),
    "baseline": (baseline("2 + 2?", "4"), parse_baseline, "9"),
}


@pytest.mark.parametrize("template", ["left", "opened"])
@pytest.mark.parametrize(
    "judge", ["pointwise", *(pytest.param(one, marks=pytest.mark.long) for one in ASKED if one != "pointwise")]
)
def test_what_is_taught_is_what_transformers_renders(folders, template, judge):
    """Prompt and judgement together have the ids of the whole dialogue, so the tag stands there once."""
    messages, parse, answer = ASKED[judge]
    judgement = JUDGEMENT.format(answer)
    tokenizer = load_tokenizer(folders / template)
    assert tokenizer.opening == ("<think>\n" if template == "opened" else "")
    taught = encode_judgement(tokenizer, judgement)
    ids = [*encode_chat(tokenizer, messages), *taught]
    theirs = transformers.AutoTokenizer.from_pretrained(folders / template)
    dialogue = [*messages, {"role": "assistant", "content": judgement}]
    assert ids == theirs.apply_chat_template(dialogue, return_dict=False)[: len(ids)]
    assert taught.count(tokenizer.control_tokens["<think>"]) == (template == "left")
    assert written(tokenizer, taught[:-1]) == judgement
    assert parse(written(tokenizer, taught[:-1])).status is Status.OK


@pytest.mark.parametrize("template", ["left", "opened"])
def test_rollouts_are_read_with_what_the_template_wrote(folders, template):
    """As sampling gives them: one that ends, and one that is cut off inside its thinking with a draft of a score."""
    tokenizer = load_tokenizer(folders / template)
    draft = JUDGEMENT.replace("Hm.", JUDGEMENT.format(9).removeprefix("<think>").replace("</think>", ""))
    texts = [encode_judgement(tokenizer, text) for text in (JUDGEMENT.format(7), draft.format(2))]
    texts[1] = texts[1][: texts[1].index(tokenizer.control_tokens["</think>"])]
    width = max(map(len, texts))
    tokens = np.array([text + [tokenizer.pad_id] * (width - len(text)) for text in texts], np.int32)
    lengths = np.array([len(text) for text in texts])
    group = Group(0, tokens, lengths, np.zeros(tokens.shape), np.array([False, True]), np.zeros((2, width, 0)), 0)
    whole, cut = read_judgements(tokenizer, group)
    assert (whole.status, whole.score, whole.text) == (Status.OK, 7.0, JUDGEMENT.format(7))
    assert (cut.status, cut.reason) == (Status.BAD_TAGS, "</think> is missing") and "<answer>9</answer>" in cut.text
    assert parse_baseline(cut.text).score is None


@pytest.mark.parametrize("template", ["left", "opened", "closed"])
def test_a_score_that_is_given_at_once_begins_behind_no_thinking(folders, tmp_path, template):
    """Whatever the template writes itself: the tag stands there once, with nothing in it."""
    closed = "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"
    folder = with_template(tiny_model_folder(tmp_path / "m"), closed) if template == "closed" else folders / template
    tokenizer = load_tokenizer(folder)
    ids = encode_question(tokenizer, ordinal("2 + 2?", "4"), ORDINAL).tolist()
    assert decode(tokenizer, ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n<answer>")
    assert ids.count(tokenizer.control_tokens["<think>"]) == ids.count(tokenizer.control_tokens["</think>"]) == 1


def test_a_template_that_ends_the_thinking_teaches_none(tmp_path):
    """It may still be sampled from: the empty thinking is part of the turn."""
    folder = with_template(
        tiny_model_folder(tmp_path / "closed"), "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"
    )
    tokenizer = load_tokenizer(folder)
    rest = JUDGEMENT.format(7).partition("</think>\n\n")[2]
    ids = tokenizer.plain.encode(rest).ids
    assert parse_pointwise(written(tokenizer, ids)).score == 7.0
    with pytest.raises(UserError, match="ends the thinking itself"):
        encode_judgement(tokenizer, JUDGEMENT.format(7))


def patarm(*arguments, code=0):
    """On one device, for which the shapes here are made."""
    command = [sys.executable, "-m", "patarm_jax", *map(str, arguments)]
    assert subprocess.run(command, env=ENVIRONMENT | {"XLA_FLAGS": ""}, check=False).returncode == code


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A tiny judge whose template opens the thinking, and that has learnt one judgement by heart."""
    root = tmp_path_factory.mktemp("opened")
    with_template(tiny_model_folder(root / "model", hidden_size=64, intermediate_size=128), OPENED)
    judgement = "<think>\na</think><generate_rubrics>b</generate_rubrics><eval>c</eval><answer>7</answer>"
    rows = [
        {"id": str(n), "prompt": f"Say {word}.", "chosen": f"{word} it is", "rejected": "no", "domain": "chat"}
        | {"chosen_judgement": judgement, "rejected_judgement": judgement}
        for n, word in enumerate(("tea", "rain", "moss", "jazz", "iron", "silk", "mint", "clay"))
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(root / "model"), "weights": "random", "dtype": "float32", "remat": "none"},
        "data": {"path": str(root / "pairs.jsonl")},
        "optimizer": {"learning_rate": 5e-3},
        "run": {"folder": str(root / "sft"), "steps": 150, "show_every": 0, "tensorboard": False},
        "pairs_per_step": 2,
    }
    (root / "sft.yaml").write_text(yaml.safe_dump(config))
    patarm("sft", root / "sft.yaml")
    return root


@pytest.mark.long
def test_sft_grpo_and_judging_agree_on_the_thinking_that_a_template_opened(learnt):
    config = {
        "model": {"path": str(learnt / "sft"), "dtype": "float32", "remat": "none"},
        "data": {"path": str(learnt / "pairs.jsonl")},
        "run": {"folder": str(learnt / "grpo"), "steps": 1, "show_every": 0, "tensorboard": False},
        "sampling": {"max_new_tokens": 64, "temperature": 0.1},
        "update": {"kl": {"coef": 0.0}},
        "pairs_per_step": 2,
        "group_size": 2,
    }
    (learnt / "grpo.yaml").write_text(yaml.safe_dump(config))
    patarm("grpo", learnt / "grpo.yaml", code=1)  # every score is 7, which is on no one's side: nothing to learn
    (line,) = [json.loads(line) for line in (learnt / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert line["judge/valid"] == 1.0 and line["rewards/format/mean"] == 0.0
    scores = learnt / "scores.jsonl"
    settings = ["--model.dtype", "float32", "--sampling.max_new_tokens", "64"]
    settings += ["--sampling.temperature", "0"]
    asked = ["--input", str(learnt / "pairs.jsonl"), "--output", str(scores)]
    patarm("judge", learnt / "sft", *asked, *settings)
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [row["score_chosen"] for row in rows] == [7.0] * 8
    assert all(one["text"].startswith("<think>\na</think>") for row in rows for one in row["judgements"]["chosen"])
    card = (learnt / "sft" / "export" / "README.md").read_text()
    assert 'text = "<think>\\n" + tokenizer.decode(' in card and 'text = "<think>\\n" + llm.chat(' in card


def test_a_decoded_prompt_shows_the_opened_thinking(tmp_path):
    tokenizer = load_tokenizer(with_template(tiny_model_folder(tmp_path), OPENED))
    assert decode(tokenizer, encode_chat(tokenizer, ASKED["pointwise"][0])).endswith("assistant\n<think>\n")
