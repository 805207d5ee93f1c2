"""An evaluation for people: `summary.md`, and the table on the console."""

from collections.abc import Mapping, Sequence

import rich.box
import rich.console
import rich.table
import rich.text

from patarm_jax.ask.replies import ALL_APART
from patarm_jax.evaluate.catalogue import BENCHMARKS
from patarm_jax.evaluate.findings import Evaluation
from patarm_jax.evaluate.rubrics import Written
from patarm_jax.evaluate.statistics import Name, TieRule
from patarm_jax.judge.forms import FORMS, Form

_TIES: dict[TieRule, str] = {"strict": "wrong", "half": "½"}  # what a tie counts as
_WORDS: dict[TieRule, str] = {rule: f"tie = {said}" for rule, said in _TIES.items()}
_INTERVALS = (
    "Intervals are Clopper and Pearson's on the effective number of comparisons (Korn and Graubard), where the items "
    "of a prompt are one unit; parts that weigh otherwise than by their size are put together by their weights."
)
_DIFFERENCES = (
    "Ours minus theirs, in points, on the same prompts. Intervals are Newcombe's for paired proportions; p is of a "
    "paired permutation test."
)
_MARGINS = "The score of Ties is not a proportion; its share of the uncertainty is resampled (bootstrap over prompts)."
_COLUMNS = {"hard": "Hard", "normal": "Normal", "easy": "Easy"}


def show(result: Evaluation) -> None:
    """Prints sections with intervals under both tie rules."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=rich.text.Text(_title(result)), title_justify="left")
    table.add_column("", no_wrap=True)
    for rule, words in _WORDS.items():
        mark = " (official)" if _official(result, rule) else ""
        table.add_column(words + mark, justify="right", no_wrap=True)
    for section in ("overall", *_sections(result)):
        table.add_row(section, *(_with_interval(result, Name(rule, section)) for rule in _WORDS))
    console = rich.console.Console()
    console.print(table)
    console.print(_reading(result), highlight=False)


# Its table was not at hand when the published rows were written.
_PATARM = (
    "only means of its gains are at hand, + 8.7 % over its base models on RewardBench and RM-Bench together (arXiv "
    "2510.24235v2), + 4.7 % over pointwise baselines (v1)."
)


def markdown(result: Evaluation) -> str:
    """The whole summary."""
    parts = [f"# {_title(result)}", _table_1(result), _reading(result), _sections_table(result)]
    parts += [_votes(result), _biases(result), _against(result)]
    parts.append(_notes(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(result: Evaluation) -> str:
    config = result.config
    votes = "1 vote" if config.votes == 1 else f"{config.votes} votes"
    return f"{result.model} on {config.benchmark}: {config.judge}, {votes}, {len(result.items):,} items"


def _official(result: Evaluation, rule: str) -> bool:
    return rule == result.official and result.is_official


def _sections(result: Evaluation) -> list[str]:
    return [name for name in result.strata.layout.sections if Name("strict", name) in result.findings.scores]


def _with_interval(result: Evaluation, name: Name) -> str:
    value, low, high = (100 * x for x in result.findings.scores[name])
    return f"{value:.1f} ({low:.1f} … {high:.1f})" if low == low else f"{value:.1f}"  # one unit has no interval


def _table_1(result: Evaluation) -> str:
    """Our rows above published ones, in the columns papers print."""
    benchmark = BENCHMARKS[result.config.benchmark]
    columns = benchmark.columns
    if not columns:
        return ""
    header = ["system", "kind", *(_COLUMNS.get(name, name) for name in columns), "ties", "source"]
    rows = []
    for rule, ties in _TIES.items():
        names = [Name(rule, "overall", c) if c in _COLUMNS else Name(rule, c) for c in columns]
        values = [found and 100 * found[0] for found in map(result.value, names)]
        mark = ", official" if _official(result, rule) else ""
        if result.missing_sections:  # published rows are means over all sections
            values = [None if name.place == "overall" else value for name, value in zip(names, values, strict=True)]
        cells = [f"**{result.model}**", result.config.judge, *map(_cell, values), ties + mark, "this evaluation"]
        rows.append(cells)
    for row in benchmark.published:
        rows.append([row.system, row.kind, *map(_cell, row.values), row.ties, row.source])
    remark = "Rows other than ours are as published, in per cent; they differ in prompts, sampling and ties."
    return "\n\n".join([_markdown_table(header, rows), f"{remark} PaTaRM itself has no row: {_PATARM}"])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(map(line, [header, ["---"] * len(header), *rows]))


def _reading(result: Evaluation) -> str:
    found, counts = result.findings, result.findings.counts
    cut = f", cut off at the limit of new tokens {100 * found.cut:.1f} %" if found.cut else ""
    parts = [f"Of {found.answers:,} answers {100 * found.valid:.1f} % could be read{cut}."]
    words = {"refused": "were refused", "too_long": "were too long to ask", "failed": "never came"}
    parts += [f"{counts[name]:,} {said}." for name, said in words.items() if counts[name]]
    return " ".join([*parts, f"Neither response won in {100 * found.ties:.1f} % of pairs."])


def verdict(result: Evaluation, answers: str) -> str:
    """What a person must know before trusting the numbers; empty where nothing is amiss.

    Args:
        result: what was found.
        answers: the path of the file that holds every answer.
    """
    found = result.findings
    little = hardly_readable(found.valid, found.answers, found.reasons, found.counts, answers)
    if not found.failed:
        return little
    never = (
        f"{found.failed:,} of {found.answers:,} answers never came, so that the numbers are of the others alone. Run "
        "the same command again to ask for them."
    )
    return f"{little} {never}".strip()


def hardly_readable(
    valid: float, answers: int, reasons: Sequence[tuple[str, int]], counts: Mapping[str, int], place: str
) -> str:
    """Words on answers of which less than half could be read; empty where more could.

    Args:
        valid: the share that could be read.
        answers: how many there are.
        reasons: why others could not be read, the most frequent first, with their numbers.
        counts: of the kinds `cut` and `too_long`.
        place: the path of the file that holds the answers.
    """
    if valid >= 0.5 or not reasons:
        return ""
    share = f"only {100 * valid:.1f} %" if valid else "none"
    reason, count = reasons[0]
    advice = ""
    if ALL_APART in reason:
        advice = "The server takes the judgement for thinking: start it without a reasoning parser. "
    elif counts["cut"] > answers / 2:
        advice = "Most were cut off: raise --sampling.max_new_tokens. "
    elif counts["too_long"] > answers / 2:
        advice = "Most were too long: raise --data.max_prompt_tokens, or the context of the server. "
        if "max_position_embeddings" in reason:
            advice = "Most were too long for the model: lower --sampling.max_new_tokens, or take another model. "
    return (
        f"{share} of the {answers:,} answers could be read, so that the numbers say little of the judge. Most often "
        f"({count:,} ×): {reason}. {advice}Look at the fields text and reason in {place}."
    )


def _sections_table(result: Evaluation) -> str:
    rows = []
    names = ["overall", *_sections(result), *(f"subset {subset}" for subset in result.strata.subsets)]
    for name in dict.fromkeys(names):
        shown = name.removeprefix("subset ") if name.startswith("subset ") else f"**{name}**"
        rows.append([shown, *(_with_interval(result, Name(rule, name)) for rule in _WORDS)])
    head = ["", *(words + (", official" if _official(result, rule) else "") for rule, words in _WORDS.items())]
    return f"## Accuracy in %, with 95 % intervals over prompts\n\n{_INTERVALS}\n\n" + _markdown_table(head, rows)


def _votes(result: Evaluation) -> str:
    if result.config.votes == 1:
        return ""
    rows = [
        [str(point["votes"]), str(point["rule"]), f"{100 * point['strict']:.1f}", f"{100 * point['half']:.1f}"]
        for point in result.findings.votes
    ]
    return "## Votes\n\nOverall accuracy in %, by the mean of so many scores or the majority of their wins.\n\n" + (
        _markdown_table(["votes", "rule", *_WORDS.values()], rows)
    )


def _biases(result: Evaluation) -> str:
    found = result.findings
    rows = [
        [name, f"{case['pairs']:,}", f"{100 * case['strict']:.1f}", f"{100 * case['half']:.1f}"]
        for name, case in found.length.items()
    ]
    text = "## Biases\n\n" + _markdown_table(["length", "pairs", *_WORDS.values()], rows)
    if found.position:
        rows = [[name, f"{100 * value:.1f}" if value == value else "–"] for name, value in found.position.items()]
        text += "\n\n" + _markdown_table(["position", "%"], rows)
    return text


def _against(result: Evaluation) -> str:
    if result.against is None:
        return ""
    rows = []
    for section in ("overall", *_sections(result)):
        for rule, words in _WORDS.items():
            one = result.against[Name(rule, section)]
            low, high = (100 * x for x in one.interval)
            rows.append([section, words, f"{100 * one.value:+.1f}", f"{low:+.1f} … {high:+.1f}", f"{one.p_value:.4f}"])
    head = ["", "ties", "difference", "95 % interval", "p"]
    return f"## Against {result.config.against}\n\n{_DIFFERENCES}\n\n" + _markdown_table(head, rows)


def _notes(result: Evaluation) -> str:
    config = result.config
    lines = [
        f"- Rules: {result.strata.layout.paper}. Official tie rule: {_WORDS[result.official]}.",
        f"- {result.strata.layout.of_unreadable}",
        f"- {_asked(result)}, seed {config.seed}.",
    ]
    if result.findings.expected is not None:
        lines.append(f"- {result.findings.expected}")
    if result.findings.generator is not None:
        lines.append(f"- {_of_rubrics(result.findings.generator, FORMS[config.judge])}")
    if result.missing_sections:
        lines.append(f"- Overall is without {', '.join(result.missing_sections)}, which the data do not hold.")
    for section, parts in result.missing_parts.items():
        lines.append(f"- {section} is without {', '.join(parts)}, which the data do not hold.")
    if set(result.strata.layout.no_proportions) & set(result.strata.subsets):
        lines.append(f"- {_MARGINS}")
    if not result.is_official:
        lines.append(f"- {result.strata.layout.of_pairwise_judges}")
    if config.limit:
        lines.append(f"- A quick look: --limit {config.limit}. Of so few the intervals are wide.")
    return "## Notes\n\n" + "\n".join(lines)


def _of_rubrics(written: Written, judge: Form) -> str:
    """What became of a generator's rubrics."""
    text = f"{written.prompts:,} rubrics by {written.generator}: {100 * written.in_form:.1f} % are in form"
    if written.criteria == written.criteria:
        text += f", with {written.criteria:.1f} criteria in the mean"
    if written.cut:
        text += f"; cut off: {written.cut:,}"
    if written.blank:
        instead = "the primary ones took their place" if judge.reads_rubrics else "the judge was asked without"
        text += f"; blank, so that {instead}: {written.blank:,}"
    if written.reasons:
        reason, count = written.reasons[0]
        text += f". Out of form most often ({count:,} ×): {reason}"
    return f"{text}."


def _asked(result: Evaluation) -> str:
    """How the judge was asked."""
    config = result.config
    if not FORMS[config.judge].writes:
        return f"Numbers of a reward model ({config.judge}), nothing is sampled"
    sampling = config.sampling
    rubrics = f"Rubrics {config.rubrics}" if FORMS[config.judge].reads_rubrics else "No rubrics"
    if result.findings.generator is not None:
        own = " and the judge's own" if FORMS[config.judge].reads_rubrics and config.rubrics == "adaptive" else ""
        rubrics = f"Rubrics of a generator{own}"
    limit = f", at most {sampling.max_new_tokens:,} new tokens" if sampling.max_new_tokens else ""
    drawn = {"temperature": sampling.temperature, "top-p": sampling.top_p, "top-k": sampling.top_k}
    set_ = [f"{name} {value:g}" for name, value in drawn.items() if value is not None and (name, value) != ("top-k", 0)]
    left = [name for name, value in drawn.items() if value is None]
    servers = [f"{', '.join(left)} as the server has it"] if left else []
    return f"{', '.join([rubrics, *set_, *servers])}{limit}"
