"""What each stage that asks nobody does with rows: pure, and what it drops it names with a reason."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from patarm_jax.config.building import StageSection
from patarm_jax.corpus.near import NearDuplicates
from patarm_jax.corpus.rows import Pair
from patarm_jax.corpus.texts import runs_of, words_of
from patarm_jax.data.pairs import pair_key_and_order, plain

# How a prompt overlaps with those of a benchmark, the surest way first.
OVERLAPS = {
    "exact": "its prompt stands word for word in a benchmark",
    "ngram": "its prompt shares a long run of words with one of a benchmark",
    "near": "its prompt nearly repeats one of a benchmark",
}


@dataclass(frozen=True)
class Dropped:
    """A row that a stage does not pass on."""

    pair: Pair
    reason: str  # one of few, by which they are counted
    about: str = ""  # which row or benchmark it is because of


@dataclass(frozen=True)
class Sifted:
    """What became of the rows of a stage: each is kept or dropped."""

    kept: list[Pair]
    dropped: list[Dropped]
    counts: Mapping[str, Mapping[str, int]] | None = None  # of decontamination: by benchmark, rows by how they overlap


def clean(pairs: Sequence[Pair], section: StageSection, language_of: Callable[[str], str] | None) -> Sifted:
    """Leaves out rows in another language, and by the lengths of their texts.

    Args:
        pairs: of the stage before.
        section: its limits.
        language_of: tells the language of a text, as ISO 639-1 has it; needed where one is asked for.
    """
    kept, dropped = [], []
    for pair in pairs:
        if reason := _unclean(pair, section, language_of):
            dropped.append(Dropped(pair, reason))
        else:
            kept.append(pair)
    return Sifted(kept, dropped)


def _unclean(pair: Pair, section: StageSection, language_of: Callable[[str], str] | None) -> str:
    """Why a row is left out; empty where it is not."""
    asked = sum(len(turn["content"]) for turn in pair.prompt)
    lengths = [len(pair.chosen), len(pair.rejected)]
    if section.max_prompt_chars and asked > section.max_prompt_chars:
        return f"prompt of more than {section.max_prompt_chars:,} characters"
    if section.max_response_chars and max(lengths) > section.max_response_chars:
        return f"response of more than {section.max_response_chars:,} characters"
    if min(lengths) < section.min_response_chars:
        return f"response of less than {section.min_response_chars:,} characters"
    if section.language and language_of is not None:
        for text in (pair.asked, pair.chosen):
            if (found := language_of(text)) != section.language:
                return f"in {found or 'no language that is known'}, not in {section.language}"
    return ""


def deduplicate(pairs: Sequence[Pair], section: StageSection) -> Sifted:
    """Leaves out rows that repeat an earlier one: the same texts, in either order, or nearly the same."""
    kept: list[Pair] = []
    dropped: list[Dropped] = []
    exact: dict[bytes, tuple[Pair, bool]] = {}
    near = NearDuplicates(section.near, section.shingle)
    for pair in pairs:
        key, order = pair_key_and_order(pair)
        if key in exact:
            earlier, before = exact[key]
            turned = ", with chosen and rejected exchanged" if before != order else ""
            dropped.append(Dropped(pair, f"repeats an earlier row{turned}", earlier.id))
            continue
        text = " ".join([*(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected])
        if (found := near.find(text)) is not None:
            dropped.append(Dropped(pair, "nearly repeats an earlier row", kept[found].id))
            continue
        exact[key] = pair, order
        near.add(text)
        kept.append(pair)
    return Sifted(kept, dropped)


def decontaminate(pairs: Sequence[Pair], section: StageSection, benchmarks: Mapping[str, Sequence[str]]) -> Sifted:
    """Leaves out rows whose last prompt stands in a benchmark: word for word, in a long run of words, or nearly.

    Args:
        pairs: of the stage before.
        section: how long a run, and how near.
        benchmarks: name → the last prompts of its items.
    """
    looked_up = {name: _Prompts(section, prompts) for name, prompts in benchmarks.items()}
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(OVERLAPS, 0) for name in benchmarks}
    kept: list[Pair] = []
    dropped: list[Dropped] = []
    for pair in pairs:
        overlaps = {name: how for name, prompts in looked_up.items() if (how := prompts.overlap(pair.asked))}
        for name, how in overlaps.items():
            counts[name][how] += 1
        if overlaps:
            surest = min(overlaps.values(), key=list(OVERLAPS).index)
            dropped.append(Dropped(pair, OVERLAPS[surest], ", ".join(overlaps)))
        else:
            kept.append(pair)
    return Sifted(kept, dropped, counts)


class _Prompts:
    """The prompts of a benchmark, to look others up in."""

    def __init__(self, section: StageSection, prompts: Sequence[str]) -> None:
        self._length = section.ngram
        self._exact = {plain(one) for one in prompts}
        self._runs = {run for one in prompts for run in self._long_runs(one)}
        self._near = NearDuplicates(section.near, section.shingle)
        for one in prompts:
            self._near.add(one)

    def overlap(self, prompt: str) -> str:
        """How a prompt overlaps with them, the surest way; empty where it does not."""
        if plain(prompt) in self._exact:
            return "exact"
        if any(run in self._runs for run in self._long_runs(prompt)):
            return "ngram"
        return "near" if self._near.find(prompt) is not None else ""

    def _long_runs(self, text: str) -> Sequence[str]:
        words = words_of(text)
        return [*runs_of(words, self._length)] if self._length and len(words) >= self._length else []
