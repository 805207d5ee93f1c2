"""Tells the language of a text, by langdetect, which draws nothing at random here."""

from collections.abc import Callable

from patarm_jax.types import UserError


def open_languages() -> Callable[[str], str]:
    """The language of a text, as ISO 639-1 has it, "" where none is found.

    Raises:
        UserError: langdetect is not installed.
    """
    try:
        import langdetect
    except ImportError as error:
        raise UserError(
            "languages are told by langdetect, which is not installed. Install it with `pip install "
            "'patarm-jax[data]'`, or leave language out."
        ) from error

    def language_of(text: str) -> str:
        langdetect.DetectorFactory.seed = 0
        try:
            return str(langdetect.detect(text)).partition("-")[0]
        except langdetect.LangDetectException:  # such as of numbers alone
            return ""

    return language_of
