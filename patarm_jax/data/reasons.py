"""Why a row cannot be learnt from: a report counts rows by these clauses. Where a setting helps, they name it."""

from typing import get_args

from patarm_jax.types import Domain


class Dropped(Exception):
    """The reason why a row is left out."""


_DOMAINS = ", ".join(get_args(Domain))

UNKNOWN_DOMAIN = (
    f"no domain that is known (of {_DOMAINS}): set data.domain for all rows that say none of them, or give a word "
    "one of them, such as data.domains.stem math, or a source, under data.source_domains"
)
DROPPED_SOURCE = "source in data.drop_sources"
EMPTY_PROMPT = "empty prompt"
NO_PROMPT = (
    "no prompt: it has no column of its own (see data.columns), and nothing in the texts says for certain where it "
    "ends and the responses begin"
)
TWO_NOTATIONS = "dialogue whose turns are marked in two notations, either of which could be meant"
UNKNOWN_MARK = "text with the prompt in it that holds a role's mark or a special token of an unknown notation"
OPEN_TURN = "dialogues of which only one goes on with a user's turn behind the response"
NOT_USERS_TURN = "prompt that does not end with a user's turn"
EMPTY_RESPONSE = "empty response"
IDENTICAL = "identical responses, white space apart (but not indentation)"
UNEQUAL_PREFIXES = "dialogues that differ before their last message"
OTHER_PROMPT = "dialogue that does not continue its prompt"
NOT_ONE_MESSAGE = "response that is not exactly one assistant message"
TEXT_AND_MESSAGES = "a response in text beside a dialogue in messages, and no prompt"
NOT_UNICODE = "text that is not valid Unicode"
BAD_JUDGEMENT = "judgement that is out of form"
BAD_RUBRIC = "rubric that is out of form"
NO_JUDGEMENT = "no judgement"
NO_RESPONSE = "no response"
NOT_MIRRORED = (
    "pairwise judgement in one order, with an A or B in it that may name something else than a response: give the one "
    "in the other order too, as pairwise_judgement_swapped"
)
NO_LABEL = (
    "no chosen_score or rejected_score, which reward.kind labels learns from: name their columns under data.columns, "
    "such as data.columns.chosen_score score_chosen, or choose another reward.kind"
)
NO_MARGIN = (
    "no margin, which margins asks for: name its column under data.columns, such as data.columns.margin score_gap, or "
    "leave margins out"
)
MARGIN_NOT_FINITE = "margin that is no finite number"
LABEL_OUT_OF_RANGE = "label of a score that is not from 0 to 10"
