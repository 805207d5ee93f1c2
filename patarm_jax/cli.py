"""The door: `patarm VERB …`. Reads the command line, calls a verb, and turns a user's mistake into one sentence."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

from patarm_jax import __version__, verbs
from patarm_jax.config.building import BuildConfig
from patarm_jax.config.help import settings_in_words
from patarm_jax.config.load import TRAINING
from patarm_jax.config.recipes import BenchConfig, EvalConfig, JudgeConfig, RubricsConfig
from patarm_jax.config.rubric_arm import ROLES
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.config.sections import Section
from patarm_jax.files import refuse_address
from patarm_jax.run.devices import PASS, keep_compiled_programs, prepare_devices
from patarm_jax.run.peers import end_all, end_together
from patarm_jax.run.process import say
from patarm_jax.types import JudgeKind, LearntNothing, UsageError, UserError

_JUDGES = get_args(JudgeKind)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 done, 1 failed, 2 wrong use."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that there is no torch
    prepare_devices()
    keep_compiled_programs()
    try:
        options, rest = _parser().parse_known_args(arguments)
        code = options.run(options, rest)
        end_together(code)
    except BrokenPipeError as error:  # `patarm … | head`
        end_all(error, "what reads its output has ended", 1)
        sys.stderr.close()
        return 1
    except LearntNothing as error:  # every process comes here alike
        say(f"patarm: {error}")
        end_together(error.exit_code)
        return error.exit_code
    except (Exception, KeyboardInterrupt) as error:
        said, code = _said(error)
        end_all(error, said or f"{type(error).__name__}: {str(error)[:300]}", code)
        if not said:
            raise
        print(f"patarm: {said}", file=sys.stderr)
    return code


def _said(error: BaseException) -> tuple[str, int]:
    """(the sentence that is said of an error, empty where it is a fault of ours; the exit code)."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once; what was saved before is whole", 1
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"the devices ran out of memory: {' '.join(str(error).split())[:300]}. Raise micro_batches, of which 0 "
            "finds the fewest that fit, lower pairs_per_step, group_size or sampling.max_new_tokens, or use a larger "
            f"mesh; --dry-run shows what is needed. Where little is lacking, {PASS}=1 lets XLA recompute more to save "
            "memory."
        ), 1
    return "", 1


class _Once(argparse.Action):
    """Stores the value of an option, which may be given once: of two, one would be ignored."""

    def __call__(self, parser: Any, namespace: object, values: object, option_string: str | None = None) -> None:
        given = vars(namespace).setdefault("given", set())
        if option_string and self.dest in given:
            parser.error(f"{option_string} is given twice. Give it once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Argparse that raises its errors, as one sentence, instead of printing usage and leaving."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register("action", None, _Once)  # in place of `store`
        self.settings: Mapping[str, type[Section]] = {}  # the configs whose settings can follow, by when they can

    def format_help(self) -> str:
        """Argparse's, and behind it every setting that can follow."""
        shown = super().format_help()
        for when, config in self.settings.items():
            shown += f"\nsettings that can follow{when}, each with its default:\n{settings_in_words(config())}\n"
        return shown

    def error(self, message: str) -> None:  # type: ignore[override]  # it does not return here either
        raise UsageError(f"{message}. `{self.prog} --help` shows how it is used.")


_Verbs: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="patarm", description="Train generative reward models from preference pairs.")
    parser.add_argument("--version", action="version", version=f"patarm_jax {__version__}")
    table = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    _add_demo(table)
    _add_training(table)
    _add_judge(table)
    _add_rubrics(table)
    _add_eval(table)
    _add_data(table)
    _add_report(table)
    _add_bench(table)
    _add_export(table)
    return parser


def _add_demo(table: _Verbs) -> None:
    demo = _verb(
        table,
        "demo",
        verbs.demo,
        "everything end to end in minutes, no downloads",
        ["patarm demo --out runs/demo", "patarm demo --system pairwise --out runs/pairwise"],
    )
    demo.add_argument("--out", type=_path, default=Path("runs/demo"), help="folder it writes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    demo.add_argument(
        "--system",
        choices=("pointwise", "pairwise", "rubric-arm", "policy"),
        default="pointwise",
        help="a judge of one response, of two, of two by rubrics, or a policy and its judge (default: %(default)s)",
    )
    demo.add_argument("--short", action="store_true", help="a few steps of everything: minutes become seconds")


def _add_training(table: _Verbs) -> None:
    verbs_and_what = {
        "sft": "teach a model the form of judgements",
        "grpo": "train a judge on preference pairs",
        "reward-model": "train a reward model that writes nothing on preference pairs",
        "rubric-arm": "train a generator of rubrics and a judge that compares by them, in turns",
        "policy": "train a policy by what judges, reward models and functions say of its responses",
        "dpo": "train a policy on preference pairs, by direct preference optimisation",
    }
    for verb, what in verbs_and_what.items():
        name = verb.replace("-", "_")
        examples = [
            f"patarm {verb} configs/qwen3_8b_{name}.yaml",
            f"patarm {verb} configs/tiny_{name}.yaml --run.seed 1 --run.folder runs/try",
            f"patarm {verb} configs/qwen3_8b_{name}.yaml --dry-run",
        ]
        train = _verb(table, verb, verbs.train, what, examples)
        train.add_argument("config", type=_path, metavar="CONFIG.yaml")
        train.add_argument("--dry-run", action="store_true", help="show config, batch and memory, train nothing")
        train.settings = {"": TRAINING[name]}


def _add_judge(table: _Verbs) -> None:
    examples = ["patarm judge runs/demo/grpo --input pairs.jsonl --output scores.jsonl --votes 8"]
    examples.append(
        "patarm judge judge-8b --judge rubric_judge --generator generator-8b --input … --output … --votes 5"
    )
    examples.append("patarm judge runs/demo/grpo --input pairs.jsonl --output scores.jsonl --dry-run")
    judge = _verb(table, "judge", verbs.judge, "judge the pairs of a file", examples)
    judge.usage = "patarm judge MODEL --input INPUT --output OUTPUT [--option …] [--setting value …]"
    judge.add_argument(
        "--input", type=_place, required=True, help="pairs: a file, a folder of files, or a Hub id, as data.path"
    )
    judge.add_argument("--output", type=_place, required=True, help="what is judged, one JSON line per pair")
    judge.add_argument("--judge", choices=_JUDGES, default="pointwise", help="how it is asked (default: %(default)s)")
    judge.add_argument(
        "--generator", type=_place, default="", help="the model that writes a rubric for each prompt, to judge by"
    )
    judge.add_argument(
        "--votes", type=int, default=1, help="judgements of each response, or in each order (default: %(default)s)"
    )
    judge.add_argument("--expected-score", action="store_true", help="the expectation instead of the number drawn")
    judge.add_argument("--dry-run", action="store_true", help="say what it will cost, judge nothing")
    model = "a Hugging Face folder, or the folder of a finished run; none where --endpoint.url is given"
    judge.epilog = f"MODEL: {model}\n\n{judge.epilog or ''}"
    judge.settings = {"": JudgeConfig}


def _add_rubrics(table: _Verbs) -> None:
    examples = ["patarm rubrics runs/arm/generator/export --input pairs.jsonl --output pairs_with_rubrics.jsonl"]
    examples.append("patarm rubrics --generator.endpoint.url http://host:8000/v1 --input … --output …")
    rubrics = _verb(table, "rubrics", verbs.rubrics, "write a generator's rubrics beside the pairs of a file", examples)
    rubrics.usage = "patarm rubrics GENERATOR --input INPUT --output OUTPUT [--setting value …]"
    rubrics.add_argument(
        "--input", type=_place, required=True, help="pairs: a file, a folder of files, or a Hub id, as data.path"
    )
    rubrics.add_argument("--output", type=_place, required=True, help="the same rows with their rubrics, a .jsonl file")
    rubrics.add_argument("--dry-run", action="store_true", help="say what it will cost, write nothing")
    what = "a Hugging Face folder, or the generator/export of a run; none where --generator.endpoint.url is given"
    rubrics.epilog = f"GENERATOR: {what}\n\n{rubrics.epilog or ''}"
    rubrics.settings = {"": RubricsConfig}


def _add_eval(table: _Verbs) -> None:
    examples = [
        "patarm eval rewardbench --model judge-8b --data allenai/reward-bench --output runs/rewardbench",
        "patarm eval rm-bench --model judge-8b --data RM-Bench/data --output runs/rm-bench --votes 8",
        "patarm eval rewardbench --model judge-8b --output runs/look --limit 50",
        "patarm eval rewardbench --model judge-8b --output runs/rewardbench --dry-run",
        "patarm eval judgebench --endpoint.url http://host:8000/v1 --output runs/judgebench --judge pairwise",
        "patarm eval rewardbench --judge rubric_judge --model judge-8b --generator generator-8b --output … --votes 5",
        "patarm eval pairs --model runs/demo/grpo --data runs/demo/data/heldout.jsonl --output runs/heldout",
        "patarm eval pairs --model runs/demo/sft --data … --output runs/sft --against runs/heldout",
        "patarm eval ifeval --model runs/policy --output runs/ifeval",
        "patarm eval ifeval --responses responses.jsonl --output runs/ifeval",
        "patarm eval win-rate --model runs/policy --against runs/base --judge-model runs/pairwise --output runs/wins",
        "patarm eval best-of-n --model runs/policy --judge-model runs/judge --n 16 --checker ifeval --output runs/best",
    ]
    evaluate = _verb(table, "eval", verbs.evaluate, "evaluate a judge on a benchmark, or a policy", examples)
    of_policies = ", ".join(verbs.POLICY_BENCHMARKS)
    evaluate.add_argument(
        "benchmark", metavar="BENCHMARK", help=f"{', '.join(verbs.BENCHMARKS)}; of a policy: {of_policies}"
    )
    evaluate.add_argument(
        "--model", type=_place, default="", help="a Hugging Face folder, or the folder of a finished run"
    )
    evaluate.add_argument(
        "--data", type=_place, default="", help="the official files, a Hub id; default: the official Hub id"
    )
    evaluate.add_argument("--output", type=_place, default="", help="folder that is written")
    evaluate.add_argument(
        "--judge", choices=_JUDGES, default="pointwise", help="how it is asked (default: %(default)s)"
    )
    evaluate.add_argument(
        "--generator", type=_place, default="", help="the model that writes a rubric for each prompt, to judge by"
    )
    evaluate.add_argument("--judge-model", type=_place, default="", help="of a policy's responses: who judges them")
    evaluate.add_argument("--votes", type=int, default=1, help="answers to each question (default: %(default)s)")
    evaluate.add_argument("--expected-score", action="store_true", help="the expectation instead of the number drawn")
    evaluate.add_argument("--limit", type=int, default=0, help="about so many items, for a quick look")
    evaluate.add_argument(
        "--seed", type=int, default=0, help="of sampling, votes drawn and p-values (default: %(default)s)"
    )
    evaluate.add_argument(
        "--against", type=_place, default="", help="to compare with: another judge's folder; of win-rate, the baseline"
    )
    evaluate.add_argument("--dry-run", action="store_true", help="say what it will cost, ask nothing")
    evaluate.settings = {" a benchmark of judges": EvalConfig, f" {of_policies}": PolicyEvalConfig}


def _add_data(table: _Verbs) -> None:
    examples = ["patarm data build configs/data_paper.yaml", "patarm data build configs/tiny_data.yaml --dry-run"]
    examples.append("patarm data show runs/data/05-write/train.parquet --rows 3")
    data = _verb(table, "data", verbs.data, "make a set of preferences of public sources, or look at one", examples)
    data.usage = (
        "patarm data build CONFIG.yaml [--dry-run] [--setting value …]\n       patarm data show FILE [--rows N]"
    )
    data.add_argument("what", choices=("build", "show"), help="make a set in stages, or print rows of a file of pairs")
    data.add_argument("path", type=_path, metavar="CONFIG.yaml or FILE")
    data.add_argument("--dry-run", action="store_true", help="say which stages are there, make none")
    data.add_argument("--shard", default="1/1", help="of build, ask the i-th of n parts of a stage's questions, as 2/4")
    data.add_argument("--rows", type=int, default=3, help="of show, spread over the file (default: %(default)s)")
    data.settings = {"": BuildConfig}


def _add_report(table: _Verbs) -> None:
    examples = ["patarm report runs/grpo", "patarm report runs/grpo --out report.html --megabytes 100"]
    report = _verb(table, "report", verbs.report, "a run, or a set that was built, as one page", examples)
    report.add_argument("folder", type=_path, metavar="RUN", help="the folder of a run or of a set, whole or not")
    report.add_argument("--out", type=_path, help="the file that is written (default: RUN/report.html)")
    report.add_argument("--megabytes", type=int, default=25, help="of rows it may hold (default: %(default)s)")


def _add_bench(table: _Verbs) -> None:
    examples = [
        "patarm bench",
        "patarm bench --quick",
        "patarm bench grpo sample --mean_new 106 --json bench.json",
        "patarm bench sft --model 4b --dtype bfloat16 --rows 8 --length 4096",
        "patarm bench sample --compiled-for h100 --model 8b --dtype bfloat16 --responses 400 --group 1 --prompt 128",
    ]
    bench = _verb(table, "bench", verbs.bench, "measure speed and memory", examples)
    bench.usage = "patarm bench [TASK …] [--quick] [--compiled-for CARD] [--json FILE] [--setting value …]"
    bench.add_argument("--quick", action="store_true", help="compare with plain implementations, in two minutes")
    compiled_for = "without running anything: what sft, sample and grpo would do on an h100 or a100 that is not here"
    bench.add_argument("--compiled-for", metavar="CARD", help=compiled_for)
    bench.add_argument("--json", type=_path, metavar="FILE", help="write the numbers there too")
    tasks = "sft, sample, logprobs, grpo, attention, decode, load, compile"  # not imported: they need the devices
    bench.epilog = f"tasks: {tasks}; all when none is named\n\n{bench.epilog or ''}"
    bench.settings = {"": BenchConfig}


def _add_export(table: _Verbs) -> None:
    examples = ["patarm export runs/grpo judge-8b", "patarm export runs/grpo/checkpoints/400 judge-8b"]
    examples.append("patarm export runs/grpo judge-8b --best")
    export = _verb(table, "export", verbs.export, "a checkpoint as a Hugging Face folder", examples)
    export.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="a run folder, or one of its checkpoints")
    export.add_argument("out", type=_path, metavar="OUT", help="folder that is written; must not exist")
    export.add_argument("--best", action="store_true", help="of a run, the checkpoint that the held-out pairs chose")
    export.add_argument("--lora", choices=["merged", "adapter"], help="of a run with adapters, instead of lora.export")
    export.add_argument("--role", choices=ROLES, help="of a run that trains two models together, which of them")


def _verb(
    table: _Verbs,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], int],
    what: str,
    examples: Sequence[str],
) -> _Parser:
    shown = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    parser = table.add_parser(
        name,
        help=what,
        description=what,
        epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a setting of the config may begin like an option
    )
    parser.set_defaults(run=run)
    return parser


def _place(text: str) -> str:
    """A file or folder on this machine; argparse names the argument in what is said."""
    try:
        refuse_address(text, "it")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
    return text


def _path(text: str) -> Path:
    return Path(_place(text))
