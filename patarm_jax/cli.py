"""The door: `patarm VERB …`. Reads the command line, calls a recipe, and turns a user's mistake into one sentence."""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, get_args

from patarm_jax import __version__
from patarm_jax.config.help import settings_in_words
from patarm_jax.config.load import TRAINING, Config, from_mapping, load, override, read_yaml
from patarm_jax.config.recipes import BenchConfig, EvalConfig, JudgeConfig, RubricsConfig, SFTConfig
from patarm_jax.config.rubric_arm import ROLES
from patarm_jax.config.scoring import PolicyEvalConfig, PolicysJudgeSection
from patarm_jax.config.sections import GeneratorSection, ModelSection, Section
from patarm_jax.files import refuse_address
from patarm_jax.run.devices import PASS, keep_compiled_programs, prepare_devices
from patarm_jax.run.joining import tell_why_absent
from patarm_jax.run.peers import end_all, end_together
from patarm_jax.run.process import say
from patarm_jax.types import BenchmarkName, JudgeKind, LearntNothing, PolicyBenchmarkName, UsageError, UserError

_BENCHMARKS, _JUDGES = get_args(BenchmarkName), get_args(JudgeKind)
_POLICY_BENCHMARKS = get_args(PolicyBenchmarkName)

# Recipes are imported when their verb is called, so that `--help` and a typo answer at once.


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
            f"the devices ran out of memory: {' '.join(str(error).split())[:300]}. Raise micro_batches, lower "
            "pairs_per_step, group_size or sampling.max_new_tokens, or use a larger mesh; --dry-run shows what is "
            f"needed. Where little is lacking, {PASS}=1 lets XLA recompute more to save memory."
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
        self.settings: type[Section] | None = None  # the config whose settings can follow

    def format_help(self) -> str:
        """Argparse's, and behind it every setting that can follow."""
        shown = super().format_help()
        if self.settings is None:
            return shown
        return f"{shown}\nsettings that can follow, each with its default:\n{settings_in_words(self.settings())}\n"

    def error(self, message: str) -> None:  # type: ignore[override]  # it does not return here either
        raise UsageError(f"{message}. `{self.prog} --help` shows how it is used.")


_Verbs: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="patarm", description="Train generative reward models from preference pairs.")
    parser.add_argument("--version", action="version", version=f"patarm_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    _add_demo(verbs)
    _add_training(verbs)
    _add_judge(verbs)
    _add_rubrics(verbs)
    _add_eval(verbs)
    _add_report(verbs)
    _add_bench(verbs)
    _add_export(verbs)
    return parser


def _add_demo(verbs: _Verbs) -> None:
    demo = _verb(
        verbs,
        "demo",
        _demo,
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


def _add_training(verbs: _Verbs) -> None:
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
        train = _verb(verbs, verb, _train, what, examples)
        train.add_argument("config", type=_path, metavar="CONFIG.yaml")
        train.add_argument("--dry-run", action="store_true", help="show config, batch and memory, train nothing")
        train.settings = TRAINING[name]


def _add_judge(verbs: _Verbs) -> None:
    examples = ["patarm judge runs/demo/grpo --input pairs.jsonl --output scores.jsonl --votes 8"]
    examples.append(
        "patarm judge judge-8b --judge rubric_judge --generator generator-8b --input … --output … --votes 5"
    )
    examples.append("patarm judge runs/demo/grpo --input pairs.jsonl --output scores.jsonl --dry-run")
    judge = _verb(verbs, "judge", _judge, "judge the pairs of a file", examples)
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
    judge.settings = JudgeConfig


def _add_rubrics(verbs: _Verbs) -> None:
    examples = ["patarm rubrics runs/arm/generator/export --input pairs.jsonl --output pairs_with_rubrics.jsonl"]
    examples.append("patarm rubrics --generator.endpoint.url http://host:8000/v1 --input … --output …")
    rubrics = _verb(verbs, "rubrics", _rubrics, "write a generator's rubrics beside the pairs of a file", examples)
    rubrics.usage = "patarm rubrics GENERATOR --input INPUT --output OUTPUT [--setting value …]"
    rubrics.add_argument(
        "--input", type=_place, required=True, help="pairs: a file, a folder of files, or a Hub id, as data.path"
    )
    rubrics.add_argument("--output", type=_place, required=True, help="the same rows with their rubrics, a .jsonl file")
    rubrics.add_argument("--dry-run", action="store_true", help="say what it will cost, write nothing")
    what = "a Hugging Face folder, or the generator/export of a run; none where --generator.endpoint.url is given"
    rubrics.epilog = f"GENERATOR: {what}\n\n{rubrics.epilog or ''}"
    rubrics.settings = RubricsConfig


def _add_eval(verbs: _Verbs) -> None:
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
        "patarm eval best-of-n --model runs/policy --judge-model runs/judge --n 16 --checker ifeval --output runs/best",
    ]
    evaluate = _verb(verbs, "eval", _eval, "evaluate a judge on a benchmark, or a policy", examples)
    evaluate.add_argument(
        "benchmark", metavar="BENCHMARK", help=f"{', '.join(_BENCHMARKS)}; of a policy: {', '.join(_POLICY_BENCHMARKS)}"
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
        "--against", type=_place, default="", help="folder of another judge's evaluation, to compare with"
    )
    evaluate.add_argument("--dry-run", action="store_true", help="say what it will cost, ask nothing")
    evaluate.settings = EvalConfig


def _add_report(verbs: _Verbs) -> None:
    examples = ["patarm report runs/grpo", "patarm report runs/grpo --out report.html --megabytes 100"]
    report = _verb(verbs, "report", _report, "a run's curves and rollouts as one page", examples)
    report.add_argument("folder", type=_path, metavar="RUN", help="the folder of a run, finished or not")
    report.add_argument("--out", type=_path, help="the file that is written (default: RUN/report.html)")
    report.add_argument("--megabytes", type=int, default=25, help="of rollouts it may hold (default: %(default)s)")


def _add_bench(verbs: _Verbs) -> None:
    examples = [
        "patarm bench",
        "patarm bench --quick",
        "patarm bench grpo sample --mean_new 106 --json bench.json",
        "patarm bench sft --model 4b --dtype bfloat16 --rows 8 --length 4096",
    ]
    bench = _verb(verbs, "bench", _bench, "measure speed and memory", examples)
    bench.usage = "patarm bench [TASK …] [--quick] [--json FILE] [--setting value …]"
    bench.add_argument("--quick", action="store_true", help="compare with plain implementations, in two minutes")
    bench.add_argument("--json", type=_path, metavar="FILE", help="write the numbers there too")
    tasks = "sft, sample, logprobs, grpo, attention, decode, load, compile"  # not imported: they need the devices
    bench.epilog = f"tasks: {tasks}; all when none is named\n\n{bench.epilog or ''}"
    bench.settings = BenchConfig


def _add_export(verbs: _Verbs) -> None:
    examples = ["patarm export runs/grpo judge-8b", "patarm export runs/grpo/checkpoints/400 judge-8b"]
    examples.append("patarm export runs/grpo judge-8b --best")
    export = _verb(verbs, "export", _export, "a checkpoint as a Hugging Face folder", examples)
    export.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="a run folder, or one of its checkpoints")
    export.add_argument("out", type=_path, metavar="OUT", help="folder that is written; must not exist")
    export.add_argument("--best", action="store_true", help="of a run, the checkpoint that the held-out pairs chose")
    export.add_argument("--lora", choices=["merged", "adapter"], help="of a run with adapters, instead of lora.export")
    export.add_argument("--role", choices=ROLES, help="of a run that trains two models together, which of them")


def _verb(
    verbs: _Verbs,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], int],
    what: str,
    examples: Sequence[str],
) -> _Parser:
    shown = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    parser = verbs.add_parser(
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


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    from patarm_jax.demo.story import main as demo

    demo(options.out, options.seed, options.short, options.system)
    return 0


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    name = options.verb.replace("-", "_")
    config = _told(partial(load, TRAINING[name], options.config, rest), rest, options.config)
    recipe = importlib.import_module(f"patarm_jax.recipes.{name}")
    recipe.dry_run(config) if options.dry_run else recipe.main(config)
    return 0


def _judge(options: argparse.Namespace, rest: list[str]) -> int:
    from patarm_jax.recipes.judge_file import main as judge

    given = JudgeConfig(
        judge=options.judge,
        votes=options.votes,
        output=options.output,
        expected_score=options.expected_score,
        generator=GeneratorSection(model=ModelSection(path=options.generator)),
    )
    named, settings = _named(rest, "MODEL")
    config = _told(lambda: override(given, settings), settings)
    both = {"MODEL": named and "--model.path", "--input": "--data.path"}
    _refuse_both(settings, both | {"--generator": options.generator and "--generator.model.path"})
    model = dataclasses.replace(config.model, path=named or config.model.path)
    data = dataclasses.replace(config.data, path=options.input)
    done = judge(dataclasses.replace(config, model=model, data=data), options.dry_run)
    return 0 if done or options.dry_run else 1  # stopped before: there is no output yet


def _named(rest: list[str], what: str) -> tuple[str, list[str]]:
    """The model that stands first, if there is one, and the settings behind it.

    It is not argparse's, which would take the value of a setting for it.
    """
    named = rest[0] if rest and not rest[0].startswith("-") else ""
    refuse_address(named, what)
    return named, rest[1:] if named else rest


def _rubrics(options: argparse.Namespace, rest: list[str]) -> int:
    from patarm_jax.recipes.rubrics import main as rubrics

    named, settings = _named(rest, "GENERATOR")
    config = _told(lambda: override(RubricsConfig(output=options.output), settings), settings)
    _refuse_both(settings, {"GENERATOR": named and "--generator.model.path", "--input": "--data.path"})
    model = dataclasses.replace(config.generator.model, path=named or config.generator.model.path)
    config = dataclasses.replace(
        config,
        generator=dataclasses.replace(config.generator, model=model),
        data=dataclasses.replace(config.data, path=options.input),
    )
    config.check()
    return 0 if rubrics(config, options.dry_run) else 1  # stopped before: there is no output yet


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    from patarm_jax.recipes.evaluate import main as evaluate

    if options.benchmark in _POLICY_BENCHMARKS:
        return _eval_policy(options, rest)
    if options.benchmark not in _BENCHMARKS:
        every = ", ".join((*_BENCHMARKS, *_POLICY_BENCHMARKS))
        raise UsageError(f"unknown benchmark {options.benchmark}. Use one of {every}.")
    if options.judge_model:
        raise UsageError(
            f"--judge-model is of a policy's benchmarks, and {options.benchmark} is of judges. Give --model."
        )
    config = EvalConfig(
        benchmark=options.benchmark,
        judge=options.judge,
        output=options.output,
        votes=options.votes,
        expected_score=options.expected_score,
        limit=options.limit,
        seed=options.seed,
        against=options.against,
        generator=GeneratorSection(model=ModelSection(path=options.generator)),
    )
    config = _told(partial(override, config, rest), rest)
    both = {"--model": "--model.path", "--data": "--data.path", "--generator": "--generator.model.path"}
    _refuse_both(rest, {name: getattr(options, name[2:]) and setting for name, setting in both.items()})
    model = dataclasses.replace(config.model, path=options.model or config.model.path)
    data = dataclasses.replace(config.data, path=options.data or config.data.path)
    done = evaluate(dataclasses.replace(config, model=model, data=data), options.dry_run)
    return 0 if options.dry_run or (done is not None and done.is_complete) else 1  # the same command goes on


def _eval_policy(options: argparse.Namespace, rest: list[str]) -> int:
    from patarm_jax.recipes import best_of_n, evaluate_policy

    of_judges = {
        "--judge": options.judge != "pointwise",
        "--votes": options.votes != 1,
        "--expected-score": options.expected_score,
        "--generator": options.generator,
        "--against": options.against,
    }
    if given := [name for name, is_given in of_judges.items() if is_given]:
        raise UsageError(f"{given[0]} is of judges' benchmarks, and {options.benchmark} is of policies. Leave it out.")
    begun = {name: getattr(options, name) for name in ("benchmark", "output", "limit", "seed")}
    begun["judge"] = PolicysJudgeSection(model=ModelSection(path=options.judge_model))
    config = _told(partial(override, PolicyEvalConfig(**begun), rest), rest)
    both = {"--model": "--model.path", "--data": "--data.path"}
    named = {name: getattr(options, name[2:]) and setting for name, setting in both.items()}
    _refuse_both(rest, named | {"--judge-model": options.judge_model and "--judge.model.path"})
    model = dataclasses.replace(config.model, path=options.model or config.model.path)
    data = dataclasses.replace(config.data, path=options.data or config.data.path)
    config = dataclasses.replace(config, model=model, data=data)
    config.check()
    evaluate = best_of_n.main if options.benchmark == "best-of-n" else evaluate_policy.main
    return 0 if evaluate(config, options.dry_run) or options.dry_run else 1  # the same command goes on


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    from patarm_jax.report.main import main as report

    path, what = report(options.folder, options.out, options.megabytes)
    print(f"{path}: {what}")
    return 0


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    from patarm_jax.bench.main import main as bench
    from patarm_jax.bench.main import quick
    from patarm_jax.bench.quick import QUICK

    # Not argparse's: it would take the value of a setting for a task.
    tasks = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    config = override(QUICK if options.quick else BenchConfig(), rest[len(tasks) :])
    if options.quick:
        _refuse(tasks)
        return 0 if quick(config, options.json) else 1
    bench(tasks, config, options.json)
    return 0


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    from patarm_jax.recipes.export import main as export

    export(options.checkpoint, options.out, options.best, options.lora, options.role)
    return 0


def _told(read: Callable[[], Config], rest: list[str], path: Path | None = None) -> Config:
    """A config; other processes of the run, which wait for this one, hear why it cannot be read."""
    try:
        return read()
    except UserError as error:
        found: dict[str, Any] = {}
        with contextlib.suppress(UserError):
            found = read_yaml(path) if path else {}
        words = [word for one in rest for word in one.split("=", 1)]
        given = [word for pair in itertools.pairwise(words) if pair[0].startswith("--mesh.") for word in pair]
        with contextlib.suppress(UserError):
            config = override(from_mapping(SFTConfig, {"mesh": found.get("mesh", {})}, ""), given)
            if config.mesh.distributed != "none":
                tell_why_absent(config.mesh, str(error))
        raise


def _refuse_both(rest: list[str], names: Mapping[str, str]) -> None:
    """Refuses a setting that is given by its short name, and by its long one besides."""
    given = {word.split("=")[0] for word in rest}
    for short, long in names.items():
        if long and long in given:
            raise UsageError(f"{short} and {long} are both given, and mean the same. Give one of them.")


def _refuse(rest: list[str]) -> None:
    if rest:
        raise UsageError(f"unknown arguments {' '.join(rest)}. `--help` shows what is allowed.")
