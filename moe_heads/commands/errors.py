"""Error of a command, and its text as one sentence."""

__all__ = ["CommandError", "one_sentence"]

_LONGEST = 600


class CommandError(ValueError):
    """Error in the arguments or files of a command. The message is one sentence."""


def one_sentence(error: BaseException) -> str:
    """Return the message of an error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
