"""Errors as reasons of what was not timed."""

from moe_heads.analysis._shared.microbatches import is_out_of_memory

__all__ = ["first_line", "out_of_memory", "reason_of"]

_MOST_LETTERS = 200


def reason_of(error: BaseException) -> str:
    """Why a batch size is left out at which the model raised an error."""
    return out_of_memory(error) if is_out_of_memory(error) else f"failed with {first_line(error)}"


def out_of_memory(error: BaseException) -> str:
    """The same, of an allocator's error."""
    return f"out of memory: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Type and first line of an error: compilers and allocators tell long stories."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:_MOST_LETTERS]}" if lines else type(error).__name__
