"""Reads benchmarks in their official formats: every row a prompt with responses that should score high, and low.

Nothing is judged or scored here. A row that is not of the format is an error that names row and field, and says which
benchmark it looks like.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import numpy as np

from patarm_jax.config.sections import DataSection
from patarm_jax.data.preferences import free_id, known_domain, read_preferences
from patarm_jax.data.rows import Row, read_rows
from patarm_jax.evaluate import domains
from patarm_jax.types import Benchmark, Conversation, Domain, Message, UsageError, UserError


@dataclass(frozen=True)
class Item:
    """One prompt, responses that should score high, and responses that should score low."""

    id: str  # unique in the benchmark
    subset: str
    domain: Domain
    prompt: Conversation
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    group: str  # names the prompt: its items are resampled together
    row: Mapping[str, Any]  # as it was read, for result files that repeat it
    kind: str = ""  # of RewardBench 2's Ties: ref, with one right response, or tied, with several


@dataclass(frozen=True)
class Source:
    """Where a benchmark comes from, and how a row of it is read."""

    hub: str
    split: str
    shapes: tuple[Any, ...]  # msgspec.Structs: the fields of a row and their types
    read: Callable[[Row, Any], Iterator[Item]]
    # Which files of its repository are not it, as a regular expression over their paths; SPLIT stands for the split.
    unwanted: str = ""
    further: tuple[str, str] = ("", "")  # how the Hub ids of its further parts end, and their split

    def split_of(self, path: str) -> str:
        """The split of a Hub id."""
        ending, split = self.further
        return split if ending and path.endswith(ending) else self.split


def read_benchmark(name: Benchmark, section: DataSection) -> tuple[list[Item], str]:
    """All items, ids unique, and a clause on what was read.

    Args:
        name: of the benchmark.
        section: of `pairs`, as training takes it. Of the others, path (a file, a folder or a Hub id; empty: the
            official Hub id), split, and source_domains, which overrides the table of domains by subset.
    """
    if name == "pairs":
        return _read_pairs(section)
    _refuse_what_has_no_effect(name, section)
    items, report = _read_official(name, section)
    return _with_free_ids(_with_domains(items, section.source_domains)), report


def limited(items: Sequence[Item], limit: int) -> list[Item]:
    """About so many items, in order: subsets take turns, each drawing its groups in a fixed random order.

    A larger limit draws the same and more, so that a quick look is no waste.
    """
    if not limit or limit >= len(items):
        return list(items)
    groups: dict[str, dict[str, list[int]]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.subset, {}).setdefault(item.group, []).append(index)
    rng = np.random.default_rng(0)
    waiting = [[list(members.values())[i] for i in rng.permutation(len(members))] for members in groups.values()]
    taken: list[int] = []
    while len(taken) < limit:
        for subset in waiting:
            if subset and len(taken) < limit:
                taken += subset.pop(0)
    return [items[index] for index in sorted(taken)]


# ---- Formats --------------------------------------------------------------------------------------------------------


class _Turn(msgspec.Struct):
    role: str
    content: str


_Prompt = str | list[_Turn]


class _RewardBench(msgspec.Struct):
    prompt: _Prompt
    chosen: str
    rejected: str
    subset: str
    id: int | str


def _rewardbench(row: Row, given: _RewardBench) -> Iterator[Item]:
    subset = _known(row, "subset", given.subset, domains.REWARDBENCH)
    yield _item(
        row, f"{subset}/{given.id}", subset, domains.REWARDBENCH, given.prompt, [given.chosen], [given.rejected]
    )


class _RewardBench2(msgspec.Struct):
    id: int | str
    prompt: _Prompt
    chosen: list[str]
    rejected: list[str]
    subset: str


def _rewardbench2(row: Row, given: _RewardBench2) -> Iterator[Item]:
    subset = _known(row, "subset", given.subset, domains.REWARDBENCH_2)
    _not_empty(row, chosen=given.chosen, rejected=given.rejected)
    group, kind = None, ""
    if subset == "Ties":
        if not (match := re.fullmatch(r"(ref|tied):(\d+)", str(given.id))):
            raise _wrong(row, "id", f"{given.id!r}", "ref:NUMBER or tied:NUMBER, as all of Ties")
        if match[1] == "tied" and len(given.chosen) < 2:
            raise _wrong(row, "chosen", "one response", "several where the id begins with tied")
        kind, group = match[1], match[2]
    elif len(given.chosen) != 1:
        raise _wrong(row, "chosen", f"{len(given.chosen)} responses", "one, save in the subset Ties")
    table = domains.REWARDBENCH_2
    item = _item(row, f"{subset}/{given.id}", subset, table, given.prompt, given.chosen, given.rejected, group)
    yield replace(item, kind=kind)


class _RMBench(msgspec.Struct):
    id: int | str
    prompt: _Prompt
    chosen: list[str]
    rejected: list[str]
    domain: str = ""


def _rm_bench(row: Row, given: _RMBench) -> Iterator[Item]:
    said = given.domain or Path(row.origin).stem.removesuffix("_filtered")
    domain = _known(row, "domain (or the file's name)", said, domains.RM_BENCH)
    for field, responses in (("chosen", given.chosen), ("rejected", given.rejected)):
        if len(responses) != 3:
            raise _wrong(row, field, f"{len(responses)} responses", "three: concise, detailed, detailed in markdown")
    number = str(given.id).removeprefix(f"{domain}/")
    yield _item(row, f"{domain}/{number}", domain, domains.RM_BENCH, given.prompt, given.chosen, given.rejected)


class _JudgeBench(msgspec.Struct):
    pair_id: str
    source: str
    question: str
    response_A: str
    response_B: str
    label: str


def _judgebench(row: Row, given: _JudgeBench) -> Iterator[Item]:
    source = _known(row, "source", given.source, domains.JUDGEBENCH)
    a, b = given.response_A, given.response_B
    if given.label not in ("A>B", "B>A"):
        raise _wrong(row, "label", repr(given.label), "A>B or B>A")
    chosen, rejected = (a, b) if given.label == "A>B" else (b, a)
    yield _item(row, given.pair_id, source, domains.JUDGEBENCH, given.question, [chosen], [rejected])


class _LLMBar(msgspec.Struct):
    input: str
    output_1: str
    output_2: str
    label: int


def _llmbar(row: Row, given: _LLMBar) -> Iterator[Item]:
    # The subset stands in the name of the file, or of its folder.
    file = Path(row.origin)
    words = [set(re.split(r"[^a-z]+", part.lower())) for part in (file.stem, file.parent.name)]
    subset = next((name for part in words for name in domains.LLMBAR if name.lower() in part), "")
    subset = _known(row, "the file's name", subset or row.origin, domains.LLMBAR)
    if given.label not in (1, 2):
        raise _wrong(row, "label", repr(given.label), "1 or 2")
    outputs = [given.output_1, given.output_2]
    chosen, rejected = outputs[given.label - 1], outputs[2 - given.label]
    number = row.name.rpartition(":")[2]
    yield _item(row, f"{subset}/{number}", subset, domains.LLMBAR, given.input, [chosen], [rejected])


class _RMBResponse(msgspec.Struct):
    answer: str


class _RMB(msgspec.Struct):
    pair_uid: int | str
    conversation_input: list[_Turn]
    chosen: _RMBResponse
    reject: _RMBResponse
    category_path: str


def _rmb(row: Row, given: _RMB) -> Iterator[Item]:
    parts = [part for part in given.category_path.split("/") if not part.lower().endswith("_set")]
    if not parts or parts[0] not in ("Helpfulness", "Harmlessness"):
        raise _wrong(row, "category_path", repr(given.category_path), "Pairwise_set/Helpfulness/… or …/Harmlessness/…")
    subset = "/".join(parts[:2])
    table: dict[str, Domain] = {subset: domains.RMB.get(subset) or domains.RMB.get(parts[0], "chat")}
    chosen, rejected = given.chosen.answer, given.reject.answer
    name = f"{'/'.join(parts)}/{given.pair_uid}"
    yield _item(row, name, subset, table, given.conversation_input, [chosen], [rejected])


class _PPEHuman(msgspec.Struct):
    question_id: int | str
    prompt: str
    response_1: str
    response_2: str
    winner: str
    is_code: bool = False


class _PPECorrectness(msgspec.Struct):
    question_id: int | str
    prompt: str
    scores: list[bool]
    sampled_conflict_pairs: list[tuple[int, int]]


def _ppe(row: Row, given: _PPEHuman | _PPECorrectness) -> Iterator[Item]:
    if isinstance(given, _PPEHuman):
        yield from _ppe_human(row, given)
    else:
        yield from _ppe_correctness(row, given)


def _ppe_human(row: Row, given: _PPEHuman) -> Iterator[Item]:
    """A vote; one that prefers neither says nothing about a judge."""
    if given.winner not in ("model_a", "model_b"):
        return
    responses = [given.response_1, given.response_2]
    first = given.winner == "model_a"
    chosen, rejected = responses if first else responses[::-1]
    subset = "human-code" if given.is_code else "human"
    yield _item(row, f"human/{given.question_id}", subset, domains.PPE, given.prompt, [chosen], [rejected])


def _ppe_correctness(row: Row, given: _PPECorrectness) -> Iterator[Item]:
    """Pairs of a right and a wrong response to one question."""
    # The subset stands in the name of the file, or of a folder above it: …/PPE-MATH-Best-of-K/data/train-0.parquet.
    parts = ["-".join(re.findall("[a-z]+", part.lower())) for part in reversed(Path(row.origin).parts[-3:])]
    names = [name for name in domains.PPE if not name.startswith("human")]
    found = (name for part in parts for name in names if re.search(rf"\b{name.replace('_', '-')}\b", part))
    subset = next(found, row.origin)
    subset = _known(row, "the name of the file or its folder", subset, domains.PPE)
    for number, (i, j) in enumerate(given.sampled_conflict_pairs):
        if not (0 <= min(i, j) and max(i, j) < len(given.scores)) or given.scores[i] == given.scores[j]:
            raise _wrong(row, "sampled_conflict_pairs", f"[{i}, {j}]", "the numbers of a right and a wrong response")
        right, wrong = (i, j) if given.scores[i] else (j, i)
        texts = [row.values.get(f"response_{k + 1}") for k in (right, wrong)]
        for k, text in zip((right, wrong), texts, strict=True):
            if not isinstance(text, str):
                raise _wrong(row, f"response_{k + 1}", "nothing" if text is None else type(text).__name__, "text")
        chosen, rejected = ([str(text)] for text in texts)
        name = f"{subset}/{given.question_id}/{number}"
        yield _item(row, name, subset, domains.PPE, given.prompt, chosen, rejected)


SOURCES: dict[str, Source] = {
    "rewardbench": Source("allenai/reward-bench", "filtered", (_RewardBench,), _rewardbench),
    "rewardbench2": Source("allenai/reward-bench-2", "test", (_RewardBench2,), _rewardbench2),
    "rm-bench": Source("THU-KEG/RM-Bench", "train", (_RMBench,), _rm_bench, r"/total_dataset\.json$"),
    "judgebench": Source(
        "ScalerLab/JudgeBench", "gpt", (_JudgeBench,), _judgebench, "/outputs/|response_model=(?!SPLIT)"
    ),
    "llmbar": Source("princeton-nlp/LLMBar", "", (_LLMBar,), _llmbar, "/CaseStudy/|/evaluators/"),
    "rmb": Source("Zhou-Zoey/RMB-Reward-Model-Benchmark", "", (_RMB,), _rmb, "/BoN_set/"),
    "ppe": Source(
        "lmarena-ai/PPE-Human-Preference-V1",
        "test",
        (_PPEHuman, _PPECorrectness),
        _ppe,
        further=("-Best-of-K", "train"),
    ),
}
_SEPARATED = r"\.[ct]sv(\.gz|\.zst|\.bz2|\.xz)?$"
# No data sets of the Hub: LLMBar's is a script, which nothing runs any more, and RMB lies in its repository alone.
_FILES_ONLY = {
    "llmbar": "github.com/princeton-nlp/LLMBar, Dataset/LLMBar",
    "rmb": "github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark, RMB_dataset/Pairwise_set",
}


# ---- Reading --------------------------------------------------------------------------------------------------------


def _read_official(name: str, section: DataSection) -> tuple[list[Item], str]:
    source = SOURCES[name]
    path = section.path or ("" if name in _FILES_ONLY else source.hub)
    if not path:
        raise UsageError(f"{name} is not on the Hub. Give its files as --data PATH; they lie in {_FILES_ONLY[name]}.")
    items: list[Item] = []
    rows = without = 0
    split = section.split or source.split_of(path)
    # No official file is a CSV. A folder may hold a benchmark's further parts too.
    unwanted = "|".join(filter(None, (source.unwanted.replace("SPLIT", re.escape(split)), _SEPARATED)))
    splits = (split, source.further[1]) if source.further[1] and not section.split else (split,)
    table = read_rows(path, splits if split else None, unwanted)
    for row in table.rows:
        found = list(source.read(row, _converted(name, source, row)))
        rows, without = rows + 1, without + (not found)
        items += found
    left_out = f"; {without:,} rows prefer neither response and are left out" if without else ""
    _refuse_half_of_ties(items)
    if not items:
        raise UserError(f"{path} holds nothing to judge{left_out}. Give the files of {name}.")
    return items, f"{len(items):,} items of {name} from {rows:,} rows{left_out}{table.remark}"


def _refuse_half_of_ties(items: Sequence[Item]) -> None:
    """The subset Ties is scored by prompts that stand in it twice."""
    kinds: dict[str, set[str]] = {}
    for item in items:
        if item.subset == "Ties":
            kinds.setdefault(item.group, set()).add(item.kind)
    for number, found in kinds.items():
        for kind in ("ref", "tied"):
            if kind not in found:
                raise UserError(f"Ties {number} has no {kind} row, without which it has no score. Give the whole file.")


def _read_pairs(section: DataSection) -> tuple[list[Item], str]:
    preferences, report = read_preferences(section)
    items = [
        Item(
            one.id,
            subset=one.source or "all",
            domain=one.domain,
            prompt=one.prompt,
            chosen=(one.chosen,),
            rejected=(one.rejected,),
            group=_name_of(one.prompt),
            row={"id": one.id, "source": one.source, "prompt": list(one.prompt)},
        )
        for one in preferences
    ]
    return items, str(report)


def _converted(name: str, source: Source, row: Row) -> Any:
    shape = min(source.shapes, key=lambda shape: len(set(shape.__struct_fields__) - row.values.keys()))
    try:
        return msgspec.convert(row.values, shape)
    except msgspec.ValidationError as error:
        field = re.sub(r" - at `\$\.?(.*?)`$", r", in \1", str(error)).replace("Object missing", "it lacks the")
        others = [other for other, each in SOURCES.items() if other != name and _fits(row, each)]
        hint = f" It looks like {' or '.join(others)}." if others else ""
        raise UserError(f"{row.where} is no row of {name}: {field}.{hint} It has {', '.join(row.values)}.") from error


def _fits(row: Row, source: Source) -> bool:
    for shape in source.shapes:
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert(row.values, shape)
            return True
    return False


def _item(
    row: Row,
    name: str,
    subset: str,
    table: Mapping[str, Domain],
    prompt: _Prompt,
    chosen: Sequence[str],
    rejected: Sequence[str],
    group: str | None = None,
) -> Item:
    turns = [_Turn("user", prompt)] if isinstance(prompt, str) else prompt
    said = tuple(Message(role=turn.role, content=turn.content) for turn in turns)
    if not said:
        raise _wrong(row, "prompt", "no turns", "text or messages")
    for text in (*chosen, *rejected, *(turn.content for turn in turns)):
        _refuse_lone_surrogates(row, text)
    return Item(name, subset, table[subset], said, tuple(chosen), tuple(rejected), group or _name_of(said), row.values)


def _name_of(prompt: Conversation) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:12]


def _refuse_lone_surrogates(row: Row, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{row.where} holds half a character, which is no valid Unicode. Fix the file.") from error


Value = TypeVar("Value")


def _known(row: Row, field: str, value: str, table: Mapping[str, Value]) -> str:
    if value not in table:
        raise _wrong(row, field, repr(value), f"one of {', '.join(table)}")
    return value


def _not_empty(row: Row, **fields: Sequence[str]) -> None:
    for name, responses in fields.items():
        if not responses:
            raise _wrong(row, name, "no response", "one or more")


def _wrong(row: Row, field: str, got: str, allowed: str) -> UserError:
    return UserError(f"{row.where}: {field} is {got}; allowed is {allowed}. Fix the file, or give the official one.")


def _refuse_what_has_no_effect(name: str, section: DataSection) -> None:
    given = {
        "columns": section.columns,
        "domain": section.domain,
        "domains": section.domains,
        "drop_sources": section.drop_sources,
    }
    for setting, value in given.items():
        if value:
            raise UsageError(
                f"data.{setting} is given, and {name} has its own format. Leave it out; source_domains gives a subset "
                "other rubrics, and `patarm eval pairs` reads any file."
            )


def _with_domains(items: Sequence[Item], wanted: Mapping[str, str]) -> list[Item]:
    """Subsets by the rubrics of other domains, where the user says so."""
    subsets = dict.fromkeys(item.subset for item in items)
    domains_ = {}
    for subset, said in wanted.items():
        if subset not in subsets:
            raise UsageError(f"data.source_domains names {subset}, which is no subset here. Use {', '.join(subsets)}.")
        if (domain := known_domain(said)) is None:
            allowed = ", ".join(get_args(Domain))
            raise UsageError(f"data.source_domains.{subset} is {said!r}. Use one of {allowed}.")
        domains_[subset] = domain
    return [replace(item, domain=domains_.get(item.subset, item.domain)) for item in items]


def _with_free_ids(items: Sequence[Item]) -> list[Item]:
    """Ids are unique: one that is taken gets `#2`, `#3`, …, in the order of the file."""
    numbers: dict[str, int] = {}
    return [replace(item, id=free_id(item.id, numbers)) for item in items]
