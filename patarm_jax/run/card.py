"""The model card of a judge: what it is, how it was made and measured, and code that asks it as printed."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub

from patarm_jax.config.sections import LoRASection
from patarm_jax.config.training import TrainConfig
from patarm_jax.data.scores import answer_opening
from patarm_jax.model.generation import Drawing
from patarm_jax.run.drawing import exported_drawing, heldout_in_words
from patarm_jax.run.open_model import Model
from patarm_jax.types import JudgeByRubrics, ModelKind, RubricMode

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its max_lora_rank may be
# What a name on the Hub looks like. `data/pairs.jsonl` and `./runs/sft` are files and folders.
HUB_ID = re.compile(r"[A-Za-z0-9]\w*[\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.parquet)", re.ASCII)


@dataclass(frozen=True)
class AdapterFacts:
    """What a model card says about adapters."""

    base: str  # the folder of the model that they belong to
    rank: int
    stop_ids: tuple[int, ...]  # that end what the judge writes; those of the base may be others


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
    given_rubrics: bool = False  # whether those that were given stood in place of the primary ones
    judge: ModelKind = "pointwise"  # how it is asked
    beside: JudgeByRubrics = "rubric_judge"  # the kind of judge that a generator writes for
    # As it was trained, and as it is to be served; None of a model that writes nothing.
    drawing: Drawing | None = field(default_factory=Drawing)
    measured_on: str = ""  # the held-out pairs, and how they were judged; empty where there are none
    measured: Mapping[str, float] = field(default_factory=dict)  # the metrics `eval/…` of these weights
    lora: str = ""  # the adapters that were trained, in words; empty where all weights were
    name: str = ""  # what the model is called; empty: as its run
    adapters: AdapterFacts | None = None  # where the folder holds adapters and no weights of its own


def card_of(config: TrainConfig, model: Model, pairs: int | None = None) -> ModelCardFacts:
    """What the card of a run's model says, but for the updates it has had and what was measured of it.

    Args:
        config: of the run.
        model: what training starts from.
        pairs: preference pairs that were trained on; None where they were not counted.
    """
    return ModelCardFacts(
        base_model=config.model.path + (f" with the adapters {config.model.adapter}" if config.model.adapter else ""),
        recipe=config.recipe,
        stage=config.stage_in_words,
        data_path=config.data.path,
        pairs=pairs,
        steps=0,
        reward=config.reward_in_words,
        rubrics=config.rubrics,
        given_rubrics=config.data.given_rubrics,
        judge=config.judge,
        beside=config.judged_by,
        drawing=exported_drawing(config, model),
        measured_on=heldout_in_words(config, model),
        lora=_lora_in_words(config.lora) if config.lora.rank else "",
    )


def _lora_in_words(section: LoRASection) -> str:
    return f"rank {section.rank}, alpha {section.alpha:g}, of {', '.join(section.targets)}"


def model_card(facts: ModelCardFacts, name: str, opening: str = "") -> huggingface_hub.ModelCard:
    """The model card of a judge called `name`; nothing is asked of the network.

    Args:
        facts: about the run.
        name: of the judge.
        opening: `Tokenizer.opening`, which the code of the card puts before what the judge writes.
    """
    writes, answers = facts.judge in JUDGES, facts.judge in POLICIES
    kind = KINDS.get(facts.judge, ["generative-reward-model", "judge"])
    data = huggingface_hub.ModelCardData(
        base_model=_if_on_hub(facts.base_model),
        datasets=_if_on_hub(facts.data_path),
        library_name="peft" if facts.adapters else "transformers",
        pipeline_tag="text-classification" if facts.judge == "scalar" else "text-generation",
        tags=[*([] if answers else ["reward-model"]), *kind, "patarm", facts.recipe],
    )
    beside = "beside the base model's weights, which they need" if facts.adapters else "merged into the weights"
    adapters = [("LoRA adapters", f"{facts.lora}, {beside}")] if facts.lora else []
    said = ", which the code below sets" if facts.adapters else "; generation_config.json says so to whoever serves it"
    rows = [
        ("base model", f"`{facts.base_model}`"),
        *adapters,
        ("trained by", facts.stage),
        ("training data", f"`{facts.data_path}`" + (f", {facts.pairs:,} preference pairs" if facts.pairs else "")),
        ("optimiser updates", f"{facts.steps:,}"),
        *([("reward", facts.reward)] if facts.reward else []),
        *([("rubrics", f"{facts.rubrics}{GIVEN if facts.given_rubrics else ''}")] if writes else []),
        *([("sampling", f"{facts.drawing}{said}")] if facts.drawing else []),
        *_measured(facts),
    ]
    top = TOP.format(name=name, table="\n".join(f"| {key} | {value} |" for key, value in rows))
    if facts.judge in ARMS:
        of = facts.beside if facts.judge == "rubric" else facts.judge
        text = ARM_BODY.format(name=name, does=ARMS[facts.judge], top=top, kind=of, **ARM_CODE[of])
        return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    if answers:
        thinking = str(POLICIES[facts.judge])
        text = POLICY_BODY.format(name=name, top=top, thinking=thinking, **_code(name, facts))
        return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    if not writes:
        body = ORDINAL_BODY if facts.judge == "ordinal" else SCALAR_BODY
        begun = json.dumps(answer_opening(opening))
        text = body.format(name=name, top=top, opening=begun, **_scalar_code(name, facts.adapters))
        return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    before = f"{json.dumps(opening)} + " if opening else ""
    words = {**JUDGES[facts.judge], "name": name}
    words["command"] = words["command"].format(name=name)
    words["given"] = ""
    if facts.given_rubrics:
        words["command"] += " --generator GENERATOR"
        words["note"] += GENERATOR
        words["given"] = ', rubric="1. The response names the sum. [Hard Rule]"'
    words |= _code(name, facts)
    text = BODY.format(top=top, rubrics=facts.rubrics, opening=before, **words)
    return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _measured(facts: ModelCardFacts) -> list[tuple[str, str]]:
    """The accuracy on the held-out pairs, beside what it was measured by."""
    found = facts.measured
    if facts.measured_on and "eval/reward" in found:
        gold = "".join(f"; {name[:-5]} {value:.3f}" for name, value in found.items() if _is_gold(name))
        return [("held-out reward", f"{found['eval/reward']:.3f}{gold}"), ("measured on", facts.measured_on)]
    if not facts.measured_on or "eval/accuracy_strict" not in found:
        return []
    strict, half, low, high, valid = (
        f"{100 * found.get(f'eval/{name}', math.nan):.1f}"
        for name in ("accuracy_strict", "accuracy_half", "accuracy_low", "accuracy_high", "valid")
    )
    number = f"{strict} % with a tie as wrong, {half} % with a tie as ½ (95 % interval {low} to {high})"
    readable = f"; {valid} % of the judgements could be read" if facts.judge in JUDGES else ""
    return [
        ("held-out accuracy", f"{number}{readable}"),
        ("measured on", facts.measured_on),
    ]


def _is_gold(metric: str) -> bool:
    return metric.startswith("gold/") and metric.endswith("/mean")


def _if_on_hub(name: str) -> str | None:
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _code(name: str, facts: ModelCardFacts) -> dict[str, str]:
    """What differs in the code of a card between a model and adapters, which take their settings from their base."""
    if facts.adapters is None:
        whole = f'llm = LLM("{name}")\nsampling = llm.get_default_sampling_params()\nsampling.max_tokens = 2048'
        return {"vllm": f"from vllm import LLM\n\n{whole}", "lora_request": "", "peft": "", "drawing": ""}
    drawing = facts.drawing or Drawing()
    drawn = f"temperature={drawing.temperature:g}, top_k={drawing.top_k}, top_p={drawing.top_p:g}"
    imports = "from vllm import LLM, SamplingParams\nfrom vllm.lora.request import LoRARequest"
    most = next((rank for rank in _VLLM_RANKS if rank >= facts.adapters.rank), facts.adapters.rank)
    llm = f'llm = LLM("{facts.adapters.base}", enable_lora=True, max_lora_rank={most})'
    ends = list(facts.adapters.stop_ids)
    sampled = f"do_sample=True, {drawn}" if drawing.temperature else "do_sample=False"
    return {
        "vllm": f"{imports}\n\n{llm}\nsampling = SamplingParams({drawn}, stop_token_ids={ends}, max_tokens=2048)",
        "lora_request": f', lora_request=LoRARequest("judge", 1, "{name}")',
        "peft": ", with peft installed",
        "drawing": f", eos_token_id={ends}, {sampled}",
    }


def _scalar_code(name: str, adapters: AdapterFacts | None) -> dict[str, str]:
    """The same of a scalar reward model's card."""
    if adapters is None:
        return {"served": SCALAR_SERVED.format(name=name), "peft": "", "labels": ""}
    return {"served": "", "peft": ", with peft installed", "labels": "num_labels=1, "}


KINDS = {
    "scalar": ["bradley-terry"],
    "ordinal": ["ordinal"],
    "policy": ["policy"],
    "policy_unthinking": ["policy"],
    "rubric": ["rubric-generator", "rubric-arm"],
    "rubric_judge": ["generative-reward-model", "judge", "rubric-arm"],
    "checklist": ["generative-reward-model", "judge", "rubric-arm", "rubric-arrow"],
}
# What Rubric-ARM's two models do.
ARMS = {
    "rubric": "A generator of rubrics. It reads a request and writes, before there is any response, what a good one\n"
    "must do: a numbered list of hard rules and principles. A judge then compares two responses by its rubric.",
    "rubric_judge": "A judge. It reads a request, two responses and the rubric that a generator wrote for the\n"
    "request, goes through the rubric for each response and ends with its choice, A or B.",
    "checklist": "A judge. It reads a request, one response and the rubric that a generator wrote for the request,\n"
    "and says of each criterion whether the response meets it.",
}
# How the judge of the two is asked in code, and what is read of it.
ARM_CODE = {
    "rubric_judge": {
        "parse": "parse_rubric_judge, shown_rubric",
        "module": "patarm_jax.judge.criteria",
        "more": "",
        "ask": "rubric, rubric_judge",
        "judge": 'parse_rubric_judge(answer("JUDGE", rubric_judge("What is 2 + 2?", "4", "5", criteria)))',
        "found": "choice",
        "note": "A choice is None where the judgement could not be read. It may depend on which response stands first: "
        "ask in both\norders, and take several judgements of each.",
        "each": "five judgements in each order",
        "served": "With either of them served, such as by `vllm serve JUDGE`, `--endpoint.url http://host:8000/v1` "
        "takes the place of\n`--model`, and `--generator.endpoint.url` that of `--generator`.",
    },
    "checklist": {
        "parse": "criteria_of, shown_rubric",
        "module": "patarm_jax.judge.criteria",
        "more": "from patarm_jax.judge.checklist import parse_checklist\n",
        "ask": "checklist, rubric",
        "judge": 'parse_checklist(answer("JUDGE", checklist("What is 2 + 2?", "4", criteria)), criteria_of(criteria))',
        "found": "score",
        "note": "A score is None where the judgement could not be read. This one counts the words as they are written; "
        "`patarm`\ncounts them by how likely they were, which tells apart what words do not. Scores of one prompt "
        "compare, those of\ndifferent rubrics do not.",
        "each": "five checklists of each response",
        "served": "With the generator served, such as by `vllm serve GENERATOR`, `--generator.endpoint.url "
        "http://host:8000/v1` takes\nthe place of `--generator`.",
    },
}
# What the card of each kind of judge says that writes.
JUDGES = {
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
POLICIES = {"policy": True, "policy_unthinking": False}  # whether they may think before they answer
# What is said of a judge that was trained by given rubrics.
GIVEN = ", with given ones in place of the primary ones"
GENERATOR = (
    "\n\nIt judges by a rubric that was written for the prompt beforehand: `GENERATOR` stands for a model that writes "
    "such rubrics.\nWhere they stand beside the pairs, in a column `rubric`, give `--data.given_rubrics true` to "
    "`patarm judge` instead."
)
# What stands in every card between what the model is and how it is asked.
TOP = """\
| | |
|---|---|
{table}

## Use

`{name}` stands for this folder in what follows: put its path there, or its id on the Hub.

"""
BODY = """\
# {name}

A generative reward model. {does} It was trained with `patarm_jax`.

{top}{what}

```sh
{command}
```

With vLLM:

```python
from patarm_jax.judge.parse import parse_{ask}
from patarm_jax.judge.prompts import {ask}
{vllm}
messages = {ask}("What is 2 + 2?", {responses}, domain="math", rubrics="{rubrics}"{given})
text = {opening}llm.chat(messages, sampling{lora_request})[0].outputs[0].text
print(parse_{ask}(text).{found})
```

With transformers and torch{peft}:

```python
import torch
from patarm_jax.judge.parse import parse_{ask}
from patarm_jax.judge.prompts import {ask}
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto").to(device)
messages = {ask}("What is 2 + 2?", {responses}, domain="math", rubrics="{rubrics}"{given})
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=True, return_dict=True, return_tensors="pt"
).to(device)
output = model.generate(**inputs, max_new_tokens=2048{drawing})
text = {opening}tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(parse_{ask}(text).{found})
```

{note}
"""
SCALAR_SERVED = """\
With vLLM, which takes `POST /classify` with `{{"model": …, "input": …, "use_activation": false}}`; the input is the
conversation in the chat template, and the reward stands in `data[0].probs[0]`:

```sh
vllm serve {name} --runner pooling
```

In TRL, `reward_funcs="{name}"` of `GRPOTrainer`. """
SCALAR_BODY = """\
# {name}

A scalar reward model (Bradley and Terry's). It reads a conversation and gives its last response a number, the higher
the better; it was taught differences between responses to one prompt. It was trained with `patarm_jax`.

{top}Compare it with judges, on a file of preference pairs (`prompt`, `chosen`, `rejected`):

```sh
patarm eval pairs --judge scalar --model {name} --data pairs.jsonl --output runs/pairs
```

{served}With transformers and torch{peft}:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}", {labels}dtype="auto")
messages = [{{"role": "user", "content": "What is 2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits[0, 0].item())
```
"""
ORDINAL_BODY = """\
# {name}

An ordinal reward model. It is asked for a score from 0 to 10 and does not reason: its number for a response is the mean
of the scores that it finds likely, so that the same response always gets the same. It was trained with `patarm_jax`.

{top}Compare it with judges, on a file of preference pairs (`prompt`, `chosen`, `rejected`):

```sh
patarm eval pairs --judge ordinal --model {name} --data pairs.jsonl --output runs/pairs
```

With transformers and torch{peft}:

```python
import torch
from patarm_jax.judge.prompts import ordinal
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
messages = ordinal("What is 2 + 2?", "4")
asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
begun = asked + {opening}
prefix = tokenizer(begun, add_special_tokens=False).input_ids
logprobs = []
for score in range(11):
    behind = tokenizer(f"{{score}}</answer>", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([prefix + behind])).logits[0, len(prefix) - 1 : -1]
    logprobs.append(logits.float().log_softmax(-1)[range(len(behind)), behind].sum())
print((torch.stack(logprobs).softmax(0) * torch.arange(11)).sum().item())
```
"""
POLICY_BODY = """\
# {name}

A policy: it answers prompts. It was trained with `patarm_jax`.

{top}With vLLM:

```python
{vllm}
messages = [{{"role": "user", "content": "What is 2 + 2?"}}]
thinking = {{"enable_thinking": {thinking}}}
print(llm.chat(messages, sampling{lora_request}, chat_template_kwargs=thinking)[0].outputs[0].text)
```

With transformers and torch{peft}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is 2 + 2?"}}],
    add_generation_prompt=True, enable_thinking={thinking}, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=1024{drawing})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
ARM_BODY = """\
# {name}

{does} It was trained with `patarm_jax`, by Rubric-ARM.

{top}The two models of a run belong together: `GENERATOR` and `JUDGE` stand for its folders `generator/export` and
`judge/export`, one of which is this one; where the rounds trained one of the two alone, the other is what they began
with, such as `generator/warmup`. On a file of preference pairs (`prompt`, `chosen`, `rejected`), with one
rubric for each prompt and {each}:

```sh
patarm eval pairs --judge {kind} --model JUDGE --generator GENERATOR --votes 5 \\
    --data pairs.jsonl --output runs/pairs
```

{served} Neither thinks: ask with `enable_thinking` off.

With transformers and torch:

```python
{more}from {module} import {parse}
from patarm_jax.judge.prompts import {ask}
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(folder, messages):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=1024)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


criteria = shown_rubric(answer("GENERATOR", rubric("What is 2 + 2?")))
judgement = {judge}
print(criteria, judgement.{found}, sep="\\n")
```

{note}
"""
