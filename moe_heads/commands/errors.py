"""Error of a command, and its text as one sentence."""

import re

import torch

__all__ = ["CommandError", "check_device", "one_sentence"]

_LONGEST = 600


class CommandError(ValueError):
    """Error in the arguments or files of a command. The message is one sentence."""


def check_device(name: str | None) -> None:
    """Raise an error for a device that torch does not know or this machine does not have.

    Raises:
        CommandError: If there is no such device.
    """
    try:
        if name is not None:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device: expected a device of this machine, got {name!r}: {reason}") from None


def one_sentence(error: BaseException) -> str:
    """Return the message of an error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if option := re.match(r'Parser key "(.+?)"', text):  # jsonargparse lists every type that did not match
        types = re.findall(r"xpected an? (.+?)(?= - |\.? Got| Given|$)", text)
        types = [re.sub(r"<class '(.+?)'>", r"\1", kind) for kind in types]
        value = re.split(r"(?:Given|Got) value: ", text)[-1].removesuffix(".")
        expected = " or ".join(dict.fromkeys(types)).replace("NoneType", "null") or "another value"
        return f"--{option[1]}: expected {expected}, got {value}."
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
