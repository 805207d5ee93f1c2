"""Lets ours and the peers' processes work in turns, and prints how they compare. See the README beside it."""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
from case import FIRST_WORD, case_folder
from tokenizers import Tokenizer, models, pre_tokenizers

from patarm_jax.bench.shapes import SHAPES
from patarm_jax.model import weights
from patarm_jax.model.transformer import init_params

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPTS = {"hf": ("torch", "torch_peers.py"), "trl": ("torch", "torch_peers.py"), "tunix": ("tunix", "tunix_peer.py")}
PEERS = {"sft": ("hf", "trl", "tunix"), "sample": ("hf", "tunix"), "grpo": ("trl", "tunix"), "policy": ("trl",)}


def write_model(size: str) -> Path:
    """Random weights and a tokenizer that spells token i `w<i>`."""
    folder = case_folder(size)
    if folder.is_dir():
        return folder
    config = SHAPES[size]
    weights.save(init_params(config, jax.random.key(0)), config, folder, dtype="float32", stop_ids=(1,), pad_id=0)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(FIRST_WORD, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    about |= {"eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


class Worker:
    """One peer's process."""

    def __init__(self, name: str, case: dict, log: Path) -> None:
        environment, script = SCRIPTS.get(name, ("", "ours.py"))
        python = ROOT / ".venv-peers" / environment / "bin" / "python" if environment else Path(sys.executable)
        command = [str(python), str(HERE / script), json.dumps(case), name]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.name, self.seconds, self.peak = name, [], 0.0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=os.environ | quiet,
        )  # fmt: skip
        self.log = log
        self.hear()

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended; what it said stands in {self.log}")
        return json.loads(line)

    def turn(self) -> None:
        self.say("go")
        self.seconds.append(self.hear()["seconds"])

    def end(self) -> None:
        self.say("end")
        self.peak = self.hear()["peak"]
        self.process.wait()

    def say(self, word: str) -> None:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=PEERS)
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--rows", type=int, help="sequences of sft (default: 8, small 4)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompts", type=int, help="(default: 16 of sample, 4 of grpo)")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt (default: 128 of sample, 64 of grpo)")
    parser.add_argument("--alike", type=int, default=0, help="tokens with which all prompts begin alike")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--question", type=int, default=256, help="of policy: tokens of the question to the judge")
    parser.add_argument("--judgement", type=int, default=128, help="of policy: tokens of a judgement at most")
    parser.add_argument("--mean", type=float, default=0, help="mean length of uneven completions (default: all --new)")
    parser.add_argument("--micro", type=int, help="prompts of a slice of the peers' updates, where all do not fit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", help="some of the task's peers (default: all)")
    o = parser.parse_args()
    vocab, sampling = SHAPES[o.size].vocab_size, o.task == "sample"
    shape = {
        "rows": o.rows or (8 if o.size == "tiny" else 4),
        "length": o.length,
        "prompts": o.prompts or (16 if sampling else 4),
        "prompt": o.prompt or (128 if sampling else 64),
        "alike": o.alike,
        "group": o.group,
        "new": o.new,
        "micro": o.micro or o.prompts or 4,
        "question": o.question,
        "judgement": o.judgement,
    }
    stop_ids = list(range(round(vocab / o.mean))) if o.mean else []
    case = {"task": o.task, "folder": str(write_model(o.size)), "vocab": vocab, "stop_ids": stop_ids, **shape}
    logs = ROOT / ".venv-peers" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    names = ("ours", *(PEERS[o.task] if o.peers is None else o.peers))
    workers = [Worker(name, case, logs / f"{o.task}-{name}.log") for name in names]
    for _ in range(o.repeats):
        for worker in workers:
            worker.turn()
    for worker in workers:
        worker.end()
    shown = shape | ({"mean": o.mean} if o.mean else {})
    others = ("rows", "length") if o.task != "sft" else tuple(name for name in shown if name not in ("rows", "length"))
    others += ("question", "judgement") if o.task != "policy" else ()
    mattering = (name for name in shown if name not in others)
    about = ", ".join(f"{name} {shown[name]}" for name in mattering)
    print(f"{o.task}, {o.size}, {about}; {datetime.date.today()}")
    ours = statistics.median(workers[0].seconds)
    for worker in workers:
        median = statistics.median(worker.seconds)
        print(
            f"{worker.name:6} {median:8.3f} s (from {min(worker.seconds):.3f} to {max(worker.seconds):.3f})   "
            f"{median / ours:5.2f} × ours   peak {worker.peak:6.0f} MB, {worker.peak / workers[0].peak:4.2f} × ours"
        )


if __name__ == "__main__":
    main()
