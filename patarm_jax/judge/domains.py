"""Reads the domain that a model has sorted a request into; `prompts.classify` asks for it."""

import re

from patarm_jax.judge.parse import answer_of, holds
from patarm_jax.types import DOMAINS, Domain, Judgement, Status

_DOMAIN = re.compile(r"<domain>(.*?)</domain>", re.DOTALL)


def parse_domain(text: str) -> Judgement:
    """Whether a text names one domain, behind whatever thinking; `domain_in` gives it.

    >>> parse_domain("<domain>poetry</domain>").reason
    "<domain> holds 'poetry'; it must hold one of chat, math, code, safety, instruction_following"
    """
    found = _DOMAIN.findall(answer_of(text) or "")
    if len(found) != 1:
        return Judgement(text, Status.BAD_TAGS, f"<domain> {'stands more than once' if found else 'is missing'}")
    if domain_in(text) is None:
        reason = f"<domain> {holds(found[0].strip())}; it must hold one of {', '.join(DOMAINS)}"
        return Judgement(text, Status.BAD_SCORE, reason)
    return Judgement(text, Status.OK, "")


def domain_in(text: str) -> Domain | None:
    """The domain that a text names; None where it names none, or several.

    >>> domain_in("<think>chat?</think>It is <domain> Math </domain>"), domain_in("math")
    ('math', None)
    """
    found = _DOMAIN.findall(answer_of(text) or "")
    return DOMAINS.get(found[0].strip().lower().replace(" ", "_")) if len(found) == 1 else None
