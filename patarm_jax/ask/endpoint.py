"""Puts all questions to a server that speaks OpenAI's protocol, with a bar that moves, until Ctrl-C."""

import asyncio
from collections.abc import Sequence

from patarm_jax.ask.answers import Answer, Answers, Question, missing
from patarm_jax.ask.remote import Asking, Remote
from patarm_jax.ask.replies import Parse, read_again
from patarm_jax.run.process import say
from patarm_jax.run.progress import progress
from patarm_jax.run.stopping import stop_requests
from patarm_jax.types import UserError


def ask_endpoint(remote: Remote, answers: Answers, questions: Sequence[Question], parse: Parse) -> bool:
    """Answers what is not answered yet; False when it was asked to stop before the end."""
    lacking = missing(answers.known, questions, remote.votes)
    work = [(question, vote) for question, votes in lacking for vote in votes]
    work.sort(key=lambda one: (one[0].key, one[1]) in answers.known)  # what failed before comes last
    total, section = len(questions) * remote.votes, remote.section
    done = total - len(work)
    if done:
        say(f"{done} of {total} answers are there")
    if not work:
        read_again(answers, parse, section.opens_thinking)
        return True
    if section.max_requests and len(work) > section.max_requests:
        raise UserError(
            f"{len(work):,} answers are to be asked for, and endpoint.max_requests allows {section.max_requests:,} "
            "requests; nothing was sent. Raise it, or ask for fewer answers with --limit or --votes."
        )
    say(f"asking {remote.name} at {section.url}, {section.concurrency} at a time")
    with stop_requests() as asked, progress(total, done, unit="answer") as report:

        def count(_: Answer) -> None:
            nonlocal done
            done += 1
            report(done, {})

        asking = Asking(
            remote=remote,
            answers=answers,
            parse=parse,
            work=iter(work),
            stopping=asked,
            came=count,
            answered=answers.any_came,
        )
        asyncio.run(asking.run())
    if done < total:
        say(f"stopped after {done} of {total} answers; run the same command again to resume")
        return False
    read_again(answers, parse, section.opens_thinking)
    return True
