"""What is measured is what is served: answers are drawn as the model's generation_config.json says, unless told."""

import json
import shutil

import jax
import pytest
import transformers

from patarm_jax.cli import main
from patarm_jax.config.load import override as with_flags
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.config.sections import HeldoutSection, JudgingSection, ModelSection, SamplingSection
from patarm_jax.model import weights
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.generation import Drawing, read_generation
from patarm_jax.model.transformer import init_params
from patarm_jax.run.drawing import (
    as_the_model_says,
    as_the_server_says,
    exported_drawing,
    heldout_in_words,
    heldout_sampling,
    with_heldout_sampling,
)
from patarm_jax.run.open_model import open_model
from patarm_jax.types import UserError
from tests.toys import tiny_model_folder, write_preferences

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def folder_with(path, generation=None, **config):
    """A model whose generation_config.json holds these keys beside its end tokens; None: it has no such file."""
    tiny_model_folder(path, **config)
    file = path / "generation_config.json"
    if generation is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | generation))
    return path


SAID = {
    "Qwen3's": (QWEN3, (0.6, 20, 0.95)),
    "nothing": ({}, (1.0, 0, 1.0)),
    "no file": (None, (1.0, 0, 1.0)),
    "greedy": ({"do_sample": False, "temperature": 0.7, "top_k": 50}, (0.0, 50, 1.0)),
    "a temperature alone": ({"temperature": 0.3}, (0.3, 0, 1.0)),
    "all tokens in vLLM's word": ({"top_k": -1}, (1.0, 0, 1.0)),
    "nulls": ({"temperature": None, "top_k": None, "top_p": None}, (1.0, 0, 1.0)),
}


@pytest.mark.parametrize(("generation", "drawn"), SAID.values(), ids=SAID.keys())
def test_what_is_not_set_is_the_models(tmp_path, generation, drawn):
    model = open_model(ModelSection(path=str(folder_with(tmp_path / "m", generation)), weights="random"))
    sampling = as_the_model_says(JudgingSection(), model).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens) == (*drawn, 1024)
    set_ = JudgingSection(temperature=0.0, top_k=7, top_p=0.5, max_new_tokens=9)
    sampling = as_the_model_says(set_, model).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens) == (0.0, 7, 0.5, 9)


def test_where_the_settings_come_from_is_said(tmp_path):
    def said(generation, **given):
        path = folder_with(tmp_path / "m", generation)
        return as_the_model_says(JudgingSection(**given), open_model(ModelSection(str(path), weights="random"))).said

    file = "from the model's generation_config.json"
    assert said(QWEN3) == f"sampling: temperature 0.6, top_k 20 and top_p 0.95 {file}"
    assert said(QWEN3, temperature=0.0) == f"sampling: temperature 0 (greedy) as set; top_k 20 and top_p 0.95 {file}"
    assert said({"temperature": 0.3}) == (
        f"sampling: temperature 0.3 {file}; top_k 0 and top_p 1 as generation_config.json says nothing"
    )
    assert said(None) == "sampling: temperature 1, top_k 0 and top_p 1 as generation_config.json says nothing"
    more = {
        "repetition_penalty": 1.05,
        "min_p": 0.1,
        "max_new_tokens": 64,
        "strange": 3,
        "typical_p": 1.0,
        "num_beams": 1,
    }
    assert said(QWEN3 | more).endswith(
        "; not applied here: repetition_penalty 1.05, min_p 0.1, max_new_tokens 64 and strange 3, which transformers "
        "or vLLM may take from that file"
    )


def test_an_old_model_says_it_in_its_config(tmp_path):
    """As transformers and vLLM read it where there is no generation_config.json."""
    path = folder_with(tmp_path / "m", None, temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    found = read_generation(path)
    assert (found.source, found.temperature, found.top_k, found.top_p) == ("config.json", 0.8, None, 0.9)
    assert found.others == {"repetition_penalty": 1.2}
    assert read_generation(folder_with(tmp_path / "other", None)).source == ""


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", 0), ("top_k", 1.5), ("top_p", "0.9")])
def test_a_value_that_cannot_be_drawn_by_is_refused(tmp_path, name, value):
    path = folder_with(tmp_path / "m", {name: value})
    with pytest.raises(UserError, match=rf"generation_config\.json: {name} is .*; allowed is"):
        read_generation(path)


def test_what_a_server_is_left_to_decide_is_said():
    assert as_the_server_says(JudgingSection()) == (
        "sampling: temperature, top_k and top_p not sent, so that the server draws as it does for all"
    )
    assert as_the_server_says(JudgingSection(top_k=0)).startswith("sampling: top_k 0 as set; temperature and top_p not")
    assert as_the_server_says(JudgingSection(1.0, 0, 1.0)) == "sampling: temperature 1, top_k 0 and top_p 1 as set"


def test_a_setting_can_be_unset_again():
    config = with_flags(HELDOUT, ["--heldout.sampling.temperature", "0.4", "--heldout.sampling.top_k", "null"])
    assert config.heldout.sampling == JudgingSection(temperature=0.4, max_new_tokens=5)


# ---- What runs measure and export ----

HELDOUT = GRPOConfig(heldout=HeldoutSection(path="held.jsonl", sampling=JudgingSection(top_k=3, max_new_tokens=5)))


def test_a_run_of_grpo_measures_and_exports_what_it_trains_with(tmp_path, capsys):
    model = open_model(ModelSection(path=str(folder_with(tmp_path / "m", QWEN3)), weights="random"))
    config = GRPOConfig(sampling=SamplingSection(temperature=0.9, top_p=0.8, max_new_tokens=77))
    assert exported_drawing(config, model) == Drawing(0.9, 0, 0.8)
    held = with_heldout_sampling(config, model).heldout.sampling
    assert held == JudgingSection(0.9, 0, 0.8, 77, 256)
    assert heldout_sampling(config, model) == SamplingSection(0.9, 0, 0.8, 77, 256)
    assert capsys.readouterr().err == ""
    assert with_heldout_sampling(HELDOUT, model).heldout.sampling == JudgingSection(1.0, 3, 1.0, 5, 256)
    assert capsys.readouterr().err == (
        "held-out pairs are judged at temperature 1, top_k 3, top_p 1, and the export will be served at temperature 1, "
        "top_k 0, top_p 1\n"
    )
    assert heldout_in_words(HELDOUT, model) == (
        "`held.jsonl`, 1 judgement of each response, temperature 1, top_k 3, top_p 1, at most 5 new tokens"
    )


def test_a_run_of_sft_measures_and_exports_what_its_base_says(tmp_path, capsys):
    model = open_model(ModelSection(path=str(folder_with(tmp_path / "m", QWEN3 | {"min_p": 0.1})), weights="random"))
    config = SFTConfig()
    assert exported_drawing(config, model) == Drawing(0.6, 20, 0.95)
    assert with_heldout_sampling(config, model).heldout.sampling == JudgingSection(0.6, 20, 0.95, 1024, 256)
    said = capsys.readouterr().err
    assert "top_p 0.95 from the model's generation_config.json; not applied here: min_p 0.1" in said
    assert said.endswith("may take from that file, for whoever serves the export\n")
    with_heldout_sampling(with_flags(config, ["--heldout.path", "held.jsonl"]), model)
    assert capsys.readouterr().err.endswith("for the held-out pairs and for whoever serves the export\n")
    other = with_flags(config, ["--heldout.sampling.temperature", "0", "--data.max_completion_tokens", "99"])
    assert with_heldout_sampling(other, model).heldout.sampling == JudgingSection(0.0, 20, 0.95, 99, 256)
    assert exported_drawing(other, model) == Drawing(0.0, 20, 0.95)


DRAWN = [Drawing(), Drawing(0.7, 20, 0.9), Drawing(0.0)]


@pytest.mark.parametrize("drawing", DRAWN, ids=str)
def test_transformers_draws_as_an_export_says(tmp_path, drawing):
    config = Architecture(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    weights.save(init_params(config, jax.random.key(0)), config, tmp_path / "m", stop_ids=(3,), drawing=drawing)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert theirs.do_sample == (drawing.temperature > 0)
    if theirs.do_sample:
        assert (theirs.temperature, theirs.top_k, theirs.top_p) == (drawing.temperature, drawing.top_k, drawing.top_p)
    ours = read_generation(tmp_path / "m")
    assert (ours.temperature, ours.others) == (drawing.temperature, {})
    if drawing.temperature:
        assert (ours.top_k, ours.top_p) == (drawing.top_k, drawing.top_p)


# ---- Judging ----


@pytest.mark.long
def test_judging_draws_as_the_model_says(tmp_path, capsys):
    model = folder_with(tmp_path / "m", QWEN3)
    write_preferences(tmp_path / "pairs.jsonl", 2)

    def judge(*more, output="scores"):
        capsys.readouterr()
        command = ["judge", model, "--input", tmp_path / "pairs.jsonl", "--output", tmp_path / f"{output}.jsonl"]
        command += ["--model.weights", "random", "--model.dtype", "float32", "--sampling.max_new_tokens", 4]
        code = main([*map(str, command), *map(str, more)])
        return code, capsys.readouterr()

    code, printed = judge("--dry-run")
    assert code == 0 and not (tmp_path / "scores.jsonl").exists()
    assert "temperature: 0.6\n  top_k: 20\n  top_p: 0.95\n  max_new_tokens: 4" in printed.out
    assert "answers to be asked for: 4, to 4 questions\ncompletion tokens: 16 at most\nprompt tokens: " in printed.out
    code, printed = judge()
    assert code == 0
    assert "sampling: temperature 0.6, top_k 20 and top_p 0.95 from the model's generation_config.json" in printed.err
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["sampling"] for row in rows] == [
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 4}
    ] * 2
    assert "answers to be asked for: 0, to 0 questions" in judge("--dry-run")[1].out
    # The same in flags is the same; another file is another judge.
    explicit = ["--sampling.temperature", 0.6, "--sampling.top_k", 20, "--sampling.top_p", 0.95]
    assert "these judgements were there already" in judge(*explicit)[1].err
    shutil.copytree(model, tmp_path / "kept")
    folder_with(model, QWEN3 | {"do_sample": False})
    code, printed = judge()
    assert code == 1 and "scores of another judge, of other data or with other settings" in printed.err
    assert judge(output="greedy")[0] == 0
    assert judge("--sampling.temperature", 0, output="zero")[0] == 0
    greedy, zero = ((tmp_path / f"{name}.jsonl").read_text() for name in ("greedy", "zero"))
    assert greedy == zero and greedy != (tmp_path / "scores.jsonl").read_text()
