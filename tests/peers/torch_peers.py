"""Transformers' bare loop and `generate`, and TRL's trainers: `torch_peers.py CASE hf|trl`."""

import sys
import tempfile
from collections.abc import Callable

import datasets
import torch
import transformers
import trl
from case import LEARNING_RATE, PAD, WEIGHT_DECAY, Case, Turns, read_case

torch.manual_seed(0)
transformers.logging.set_verbosity_error()


def load(case: Case) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    model.generation_config.eos_token_id = list(case.stop_ids) or None
    return model


def bare_training(case: Case, turns: Turns) -> None:
    model, ids = load(case).train(), torch.tensor(case.tokens(case.rows, case.length)).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    while True:
        turns.begin()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.end(loss=float(loss.detach()))


def generate(case: Case, turns: Turns) -> None:
    model, ids = load(case).eval(), torch.tensor(case.questions(case.prompts)).long()
    limits = dict(max_new_tokens=case.new) if case.stop_ids else dict(max_new_tokens=case.new, min_new_tokens=case.new)
    while True:
        turns.begin()
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=PAD, **limits
            )
        turns.end()


class InTurns(transformers.TrainerCallback):
    """One optimiser step of a trainer is one turn."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(self, *_, **__):
        self.turns.begin()

    def on_step_end(self, *_, **__):
        self.turns.end()


PLAIN = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000,
    learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_steps=100_000, disable_tqdm=True,
)  # fmt: skip


def trl_sft(case: Case, turns: Turns) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": case.tokens(64 * case.rows, case.length).tolist()})
    settings = trl.SFTConfig(tempfile.mkdtemp(), per_device_train_batch_size=case.rows, max_length=case.length, **PLAIN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    callbacks = [InTurns(turns)]
    trl.SFTTrainer(load(case), settings, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()


def made_up(completions: list[str], **_: object) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def judged_by(case: Case) -> Callable[..., list[float]]:
    """A judge of the policy's size: it reads prompt, response and a question, and writes a judgement of each."""
    judge, question = load(case).eval(), torch.tensor(case.tokens(case.question)).long()
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    limits = dict(max_new_tokens=case.judgement) | ({} if case.stop_ids else dict(min_new_tokens=case.judgement))

    def rewards(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        read = [
            torch.cat([torch.tensor(tokenizer(prompt).input_ids + ids).long(), question])
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(read, batch_first=True, padding_value=PAD, padding_side="left")
        with torch.no_grad():
            said = judge.generate(
                input_ids=ids, attention_mask=(ids != PAD).long(), do_sample=True, top_k=0, pad_token_id=PAD, **limits
            )
        return [float(row.sum() % 7) for row in said]

    return rewards


def trl_grpo(case: Case, turns: Turns) -> None:
    settings = trl.GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=case.micro * case.group,
        gradient_accumulation_steps=case.prompts // case.micro, num_generations=case.group,
        max_completion_length=case.new, temperature=1.0, beta=0.0, **PLAIN,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        load(case),
        reward_funcs=judged_by(case) if case.task == "policy" else made_up,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": case.texts(64)}),
        processing_class=transformers.AutoTokenizer.from_pretrained(case.folder),
        callbacks=[InTurns(turns)],
    )
    trainer.train()


if __name__ == "__main__":
    work = {
        ("hf", "sft"): bare_training, ("hf", "sample"): generate, ("trl", "sft"): trl_sft, ("trl", "grpo"): trl_grpo,
        ("trl", "policy"): trl_grpo,
    }  # fmt: skip
    given = read_case()
    work[sys.argv[2], given.task](given, Turns())
