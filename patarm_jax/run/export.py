"""A judge as others load it: a Hugging Face folder with weights, tokenizer, chat template and model card."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import jax

from patarm_jax.arrays import Params
from patarm_jax.config.recipes import TrainConfig
from patarm_jax.data.tokenizer import Tokenizer, save_tokenizer
from patarm_jax.files import appearing_whole, write_text
from patarm_jax.model import weights
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.generation import Drawing
from patarm_jax.run.drawing import exported_drawing, heldout_in_words
from patarm_jax.run.open_model import JUDGE, Model, name_of
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.types import JudgeKind, RubricMode

# What a name on the Hub looks like. `data/pairs.jsonl` and `./runs/sft` are files and folders.
HUB_ID = re.compile(r"[A-Za-z0-9]\w*[\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.parquet)", re.ASCII)


@dataclass(frozen=True)
class ModelCardFacts:
    """What a model card says about the run that made the model."""

    base_model: str  # a Hub id or a folder
    recipe: str
    stage: str  # what the recipe is, in words
    data_path: str  # a Hub id, a file or a folder
    pairs: int | None  # preference pairs that were trained on; None where they were not counted
    steps: int  # optimiser updates
    reward: str  # such as "PAR, graded margin, 8 judgements of each response"; empty where there is none
    rubrics: RubricMode
    judge: JudgeKind = "pointwise"  # how it is asked
    # As it was trained, and as it is to be served; None of a model that writes nothing.
    drawing: Drawing | None = field(default_factory=Drawing)
    measured_on: str = ""  # the held-out pairs, and how they were judged; empty where there are none
    measured: Mapping[str, float] = field(default_factory=dict)  # the metrics `eval/…` of these weights


def card_of(config: TrainConfig, model: Model, pairs: int | None = None) -> ModelCardFacts:
    """What the card of a run's model says, but for the updates it has had and what was measured of it.

    Args:
        config: of the run.
        model: what training starts from.
        pairs: preference pairs that were trained on; None where they were not counted.
    """
    return ModelCardFacts(
        base_model=config.model.path,
        recipe=config.recipe,
        stage=config.stage_in_words,
        data_path=config.data.path,
        pairs=pairs,
        steps=0,
        reward=config.reward_in_words,
        rubrics=config.rubrics,
        judge=config.judge,
        drawing=exported_drawing(config, model),
        measured_on=heldout_in_words(config, model),
    )


def write_export(
    folder: Path,
    params: Params,
    arch: Architecture,
    tokenizer: Tokenizer,
    card: ModelCardFacts,
    dtype: str = "bfloat16",
    replace: bool = False,
) -> None:
    """Writes a folder that transformers, vLLM and `patarm judge` load as it is; it appears whole or not at all.

    All processes must call it; the first one writes.

    Args:
        folder: must not exist, or be empty.
        params: the trained parameters, sharded in any way.
        arch: the network's shape.
        tokenizer: written as it was read; its stop ids become the model's.
        card: the facts for README.md.
        dtype: of the stored weights: "bfloat16", "float16" or "float32".
        replace: a folder that is not empty makes room for the new one, when that is whole.

    Raises:
        UserError: when the folder is not empty, or cannot be written, or when the weights are ruined.
    """
    refuse_ruined(
        params, "nothing is exported", "Export an earlier checkpoint, `patarm export RUN/checkpoints/STEP OUT`"
    )
    with appearing_whole(folder, replace) as part:
        ids: dict[str, Any] = {"stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
        weights.save(params, arch, part, dtype=dtype, drawing=card.drawing, **ids)
        if jax.process_index() == 0:
            save_tokenizer(tokenizer, part)
            rubrics = {"rubrics": card.rubrics} if card.judge in _WORDS else {}
            write_text(part / JUDGE, json.dumps({"judge": card.judge} | rubrics) + "\n")
            model_card(card, name_of(folder), tokenizer.opening).save(part / "README.md")


def model_card(facts: ModelCardFacts, name: str, opening: str = "") -> huggingface_hub.ModelCard:
    """The model card of a judge called `name`; nothing is asked of the network.

    Args:
        facts: about the run.
        name: of the judge.
        opening: `Tokenizer.opening`, which the code of the card puts before what the judge writes.
    """
    writes = facts.judge in _WORDS
    kind = ["generative-reward-model", "judge"] if writes else ["bradley-terry"]
    data = huggingface_hub.ModelCardData(
        base_model=_if_on_hub(facts.base_model),
        datasets=_if_on_hub(facts.data_path),
        library_name="transformers",
        pipeline_tag="text-generation" if writes else "text-classification",
        tags=["reward-model", *kind, "patarm", facts.recipe],
    )
    rows = [
        ("base model", f"`{facts.base_model}`"),
        ("trained by", facts.stage),
        ("training data", f"`{facts.data_path}`" + (f", {facts.pairs:,} preference pairs" if facts.pairs else "")),
        ("optimiser updates", f"{facts.steps:,}"),
        *([("reward", facts.reward)] if facts.reward else []),
        *([("rubrics", facts.rubrics)] if writes else []),
        *([("sampling", f"{facts.drawing}; generation_config.json says so to whoever serves it")] if writes else []),
        *_measured(facts),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    if not writes:
        text = SCALAR_BODY.format(name=name, table=table)
        return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    before = f"{json.dumps(opening)} + " if opening else ""
    words = {**_WORDS[facts.judge], "name": name}
    words["command"] = words["command"].format(name=name)
    text = BODY.format(table=table, rubrics=facts.rubrics, opening=before, **words)
    return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _measured(facts: ModelCardFacts) -> list[tuple[str, str]]:
    """The accuracy on the held-out pairs, beside what it was measured by."""
    found = facts.measured
    if not facts.measured_on or "eval/accuracy_strict" not in found:
        return []
    strict, half, low, high, valid = (
        f"{100 * found.get(f'eval/{name}', math.nan):.1f}"
        for name in ("accuracy_strict", "accuracy_half", "accuracy_low", "accuracy_high", "valid")
    )
    number = f"{strict} % with a tie as wrong, {half} % with a tie as ½ (95 % interval {low} to {high})"
    readable = f"; {valid} % of the judgements could be read" if facts.judge in _WORDS else ""
    return [
        ("held-out accuracy", f"{number}{readable}"),
        ("measured on", facts.measured_on),
    ]


def _if_on_hub(name: str) -> str | None:
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


# What the card of each kind of judge says.
_WORDS = {
    "pointwise": {
        "does": "It reads a user's prompt and one response, thinks, writes rubrics for this very case,\n"
        "evaluates the response against them and ends with a score from 0 to 10.",
        "what": "Score the responses of a file of preference pairs (`prompt`, `chosen`, `rejected`):",
        "command": "patarm judge {name} --input pairs.jsonl --output scores.jsonl",
        "ask": "pointwise",
        "responses": '"4"',
        "found": "score",
        "note": "A score is None where the judgement could not be read. Scores of one response vary: take the mean of "
        "several.",
    },
    "pairwise": {
        "does": "It reads a user's prompt and two responses, thinks, writes rubrics for this very case,\n"
        "evaluates the responses against them and ends with its choice, A or B.",
        "what": "Compare the responses of a file of preference pairs (`prompt`, `chosen`, `rejected`), in both orders:",
        "command": "patarm eval pairs --judge pairwise --model {name} --data pairs.jsonl --output runs/pairs",
        "ask": "pairwise",
        "responses": '"4", "5"',
        "found": "choice",
        "note": "A choice is None where the judgement could not be read. It may depend on which response stands first: "
        "ask in\nboth orders, and take several judgements of each.",
    },
}
BODY = """\
# {name}

A generative reward model. {does} It was trained with `patarm_jax`.

| | |
|---|---|
{table}

## Use

`{name}` stands for this folder in what follows: put its path there, or its id on the Hub.

{what}

```sh
{command}
```

With vLLM:

```python
from patarm_jax.judge.parse import parse_{ask}
from patarm_jax.judge.prompts import {ask}
from vllm import LLM

llm = LLM("{name}")
sampling = llm.get_default_sampling_params()
sampling.max_tokens = 2048
messages = {ask}("What is 2 + 2?", {responses}, domain="math", rubrics="{rubrics}")
text = {opening}llm.chat(messages, sampling)[0].outputs[0].text
print(parse_{ask}(text).{found})
```

With transformers and torch:

```python
import torch
from patarm_jax.judge.parse import parse_{ask}
from patarm_jax.judge.prompts import {ask}
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto").to(device)
messages = {ask}("What is 2 + 2?", {responses}, domain="math", rubrics="{rubrics}")
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=True, return_dict=True, return_tensors="pt"
).to(device)
output = model.generate(**inputs, max_new_tokens=2048)
text = {opening}tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(parse_{ask}(text).{found})
```

{note}
"""
SCALAR_BODY = """\
# {name}

A scalar reward model (Bradley and Terry's). It reads a conversation and gives its last response a number, the higher
the better; it was taught differences between responses to one prompt. It was trained with `patarm_jax`.

| | |
|---|---|
{table}

## Use

`{name}` stands for this folder in what follows: put its path there, or its id on the Hub.

Compare it with judges, on a file of preference pairs (`prompt`, `chosen`, `rejected`):

```sh
patarm eval pairs --judge scalar --model {name} --data pairs.jsonl --output runs/pairs
```

With vLLM, which takes `POST /classify` with `{{"model": …, "input": …, "use_activation": false}}`; the input is the
conversation in the chat template, and the reward stands in `data[0].probs[0]`:

```sh
vllm serve {name} --runner pooling
```

In TRL, `reward_funcs="{name}"` of `GRPOTrainer`. With transformers and torch:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}", dtype="auto")
messages = [{{"role": "user", "content": "What is 2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits[0, 0].item())
```
"""
