"""What each verb of the command line does with its options and settings: a config, and the recipe that it is for.

Recipes are imported when their verb is called, so that `--help` and a typo answer at once. Each gives the exit code.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from patarm_jax.config.building import BuildConfig
from patarm_jax.config.load import TRAINING, Config, from_mapping, load, override, read_yaml
from patarm_jax.config.recipes import BenchConfig, EvalConfig, JudgeConfig, RubricsConfig, SFTConfig
from patarm_jax.config.scoring import PolicyEvalConfig, PolicysJudgeSection
from patarm_jax.config.sections import GeneratorSection, ModelSection
from patarm_jax.files import refuse_address
from patarm_jax.run.joining import tell_why_absent
from patarm_jax.types import BenchmarkName, PolicyBenchmarkName, UsageError, UserError

BENCHMARKS, POLICY_BENCHMARKS = get_args(BenchmarkName), get_args(PolicyBenchmarkName)


def demo(options: argparse.Namespace, rest: list[str]) -> int:
    """Everything end to end."""
    _refuse(rest)
    from patarm_jax.demo.story import main

    main(options.out, options.seed, options.short, options.system)
    return 0


def train(options: argparse.Namespace, rest: list[str]) -> int:
    """A recipe, by the name of the verb."""
    name = options.verb.replace("-", "_")
    config = _told(partial(load, TRAINING[name], options.config, rest), rest, options.config)
    recipe = importlib.import_module(f"patarm_jax.recipes.{name}")
    recipe.dry_run(config) if options.dry_run else recipe.main(config)
    return 0


def judge(options: argparse.Namespace, rest: list[str]) -> int:
    """The pairs of a file."""
    from patarm_jax.recipes.judge_file import main

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
    done = main(dataclasses.replace(config, model=model, data=data), options.dry_run)
    return 0 if done or options.dry_run else 1  # stopped before: there is no output yet


def _named(rest: list[str], what: str) -> tuple[str, list[str]]:
    """The model that stands first, if there is one, and the settings behind it.

    It is not argparse's, which would take the value of a setting for it.
    """
    named = rest[0] if rest and not rest[0].startswith("-") else ""
    refuse_address(named, what)
    return named, rest[1:] if named else rest


def rubrics(options: argparse.Namespace, rest: list[str]) -> int:
    """Rubrics beside the pairs of a file."""
    from patarm_jax.recipes.rubrics import main

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
    return 0 if main(config, options.dry_run) else 1  # stopped before: there is no output yet


def evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    """A benchmark of judges, or of policies."""
    from patarm_jax.recipes.evaluate import main

    if options.benchmark in POLICY_BENCHMARKS:
        return _eval_policy(options, rest)
    if options.benchmark not in BENCHMARKS:
        every = ", ".join((*BENCHMARKS, *POLICY_BENCHMARKS))
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
    done = main(dataclasses.replace(config, model=model, data=data), options.dry_run)
    return 0 if options.dry_run or (done is not None and done.is_complete) else 1  # the same command goes on


def _eval_policy(options: argparse.Namespace, rest: list[str]) -> int:
    from patarm_jax.recipes import best_of_n, evaluate_policy, win_rate

    of_judges = {
        "--judge": options.judge != "pointwise",
        "--votes": options.votes != 1,
        "--expected-score": options.expected_score,
        "--generator": options.generator,
        "--against": options.against and options.benchmark != "win-rate",
    }
    if given := [name for name, is_given in of_judges.items() if is_given]:
        raise UsageError(f"{given[0]} is of judges' benchmarks, and {options.benchmark} is of policies. Leave it out.")
    begun = {name: getattr(options, name) for name in ("benchmark", "output", "limit", "seed", "against")}
    begun["judge"] = PolicysJudgeSection(model=ModelSection(path=options.judge_model))
    config = _told(partial(override, PolicyEvalConfig(**begun), rest), rest)
    both = {"--model": "--model.path", "--data": "--data.path"}
    named = {name: getattr(options, name[2:]) and setting for name, setting in both.items()}
    _refuse_both(rest, named | {"--judge-model": options.judge_model and "--judge.model.path"})
    model = dataclasses.replace(config.model, path=options.model or config.model.path)
    data = dataclasses.replace(config.data, path=options.data or config.data.path)
    config = dataclasses.replace(config, model=model, data=data)
    config.check()
    evaluate = {"best-of-n": best_of_n.main, "win-rate": win_rate.main}.get(options.benchmark, evaluate_policy.main)
    return 0 if evaluate(config, options.dry_run) or options.dry_run else 1  # the same command goes on


def data(options: argparse.Namespace, rest: list[str]) -> int:
    """A set of preferences, made or shown."""
    from patarm_jax.recipes.data import main, show

    if options.what == "show":
        _refuse(rest)
        show(options.path, options.rows)
        return 0
    number, _, shards = options.shard.partition("/")
    if not (number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise UsageError(f"--shard is {options.shard}; allowed is i/n with i from 1 to n, such as 2/4.")
    done = main(load(BuildConfig, options.path, rest), options.dry_run, (int(number), int(shards)))
    return 0 if done is not None or options.dry_run or int(shards) > 1 else 1  # the same command goes on


def report(options: argparse.Namespace, rest: list[str]) -> int:
    """A run, or a set that was built, as one page."""
    _refuse(rest)
    from patarm_jax.report import built
    from patarm_jax.report import main as run

    path, what = (built if built.is_built(options.folder) else run).main(options.folder, options.out, options.megabytes)
    print(f"{path}: {what}")
    return 0


def bench(options: argparse.Namespace, rest: list[str]) -> int:
    """Speed and memory."""
    from patarm_jax.bench.main import ahead, main, quick
    from patarm_jax.bench.quick import QUICK

    # Not argparse's: it would take the value of a setting for a task.
    tasks = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    config = override(QUICK if options.quick else BenchConfig(), rest[len(tasks) :])
    if options.quick:
        _refuse(tasks)
        return 0 if quick(config, options.json) else 1
    if options.compiled_for:
        ahead(options.compiled_for, tasks, config, options.json)
        return 0
    main(tasks, config, options.json)
    return 0


def export(options: argparse.Namespace, rest: list[str]) -> int:
    """A checkpoint as a Hugging Face folder."""
    _refuse(rest)
    from patarm_jax.recipes.export import main

    main(options.checkpoint, options.out, options.best, options.lora, options.role)
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
