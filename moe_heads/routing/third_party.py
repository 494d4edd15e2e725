"""Decisions of routers of other packages, from the tensors that they return, as the fields of a `Routing`.

Shapes: N rows, or B samples of T tokens, E experts, K choices per row.
"""

from typing import Any

import torch
from torch import Tensor

from moe_heads.modes import can_read_without_sync
from moe_heads.routing.choices import consistent_rows, surplus_of_choices

__all__ = ["fields_of_choices", "fields_of_probs"]


def fields_of_probs(
    probs: Tensor,
    indices: Tensor | None,
    weights: Tensor | None,
    rows_per_sample: int | None,
    scores: Tensor | None,
    is_trusted: bool = False,
) -> dict[str, Any]:
    """Return the fields of a routing with known scores of all experts. See `Routing.from_probs`.

    With ``is_trusted``, values are not checked: the caller knows that signs are right and no choice is repeated.
    """
    if probs.dim() not in (2, 3) or not probs.is_floating_point():
        raise ValueError(
            f"probs: expected floating point numbers (N, E) or (B, T, E), got {tuple(probs.shape)}, {probs.dtype}."
        )
    if weights is not None and (indices is None or weights.shape != indices.shape):
        raise ValueError(f"weights: expected the shape of indices, got {tuple(weights.shape)}.")
    if scores is not None and scores.shape != probs.shape:
        raise ValueError(f"scores: expected the shape of probs, {tuple(probs.shape)}, got {tuple(scores.shape)}.")
    if indices is not None:
        _check_form(indices, probs.shape[:-1], probs.shape[-1])
    if not is_trusted:
        _check_signs("probs", probs, " Pass logits.softmax(-1), not logits.")
        if weights is not None:
            _check_signs("weights", weights)
        if indices is not None:
            _check_values(indices, probs.shape[-1])
    rows_per_sample = _rows_per_sample(rows_per_sample, probs)
    probs = probs.flatten(0, -2)
    tiny = torch.finfo(probs.dtype).tiny
    # a score that underflows to zero keeps a finite logit; the logarithm of a negative score is nan
    logits = torch.where(probs == 0, tiny, probs).log()
    drops = False
    if indices is not None:
        indices, weights, drops = _choices(probs, indices, weights)
        if not (can_read_without_sync(weights) and bool(weights.sum().isfinite())):
            logits = torch.where(weights.isfinite().all(-1, keepdim=True), logits, torch.nan)
        scores = _confirmed(None if scores is None else scores.flatten(0, -2), probs, logits, indices, drops)
    elif scores is not None:
        scores = scores.flatten(0, -2)
    return {
        "logits": logits,
        "probs": probs / probs.sum(-1, keepdim=True).clamp_min(tiny),
        "indices": indices,
        "weights": weights,
        "scores": scores,
        "drops": drops,
        "rows_per_sample": rows_per_sample,
    }


def _choices(probs: Tensor, indices: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """Return the choices (N, K), int64, with E for those that were dropped, their weights, and whether some may be."""
    num_experts, indices = probs.shape[-1], indices.flatten(0, -2).long()
    weights = None if weights is None else weights.flatten(0, -2)
    if can_read_without_sync(indices) and indices.numel():
        lowest, highest = indices.aminmax()
        if lowest >= 0 and highest < num_experts and (weights is None or bool(weights.min() > 0)):
            return indices, probs.gather(-1, indices) if weights is None else weights, False
    indices, kept = _with_sentinel(indices, num_experts)
    of_choices = probs.gather(-1, indices.clamp_max(num_experts - 1))
    if weights is None:
        return indices, torch.where(kept, of_choices, 0), _has_any(~kept)
    # a weight of zero is a choice that was dropped, unless it is a small number that was rounded to zero
    kept = kept & ~((weights == 0) & (of_choices > torch.finfo(weights.dtype).smallest_normal))
    return torch.where(kept, indices, num_experts), torch.where(kept, weights, 0), _has_any(~kept)


def fields_of_choices(
    indices: Tensor, num_experts: int, weights: Tensor | None, rows_per_sample: int | None
) -> dict[str, Any]:
    """Return the fields of a routing whose scores are unknown. See `Routing.from_choices`."""
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts: expected an integer of at least 1, got {num_experts!r}.")
    if not isinstance(indices, Tensor) or indices.dim() not in (2, 3):
        got = tuple(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"indices: expected integers of shape (N, K) or (B, T, K), got {got}.")
    _check_form(indices, indices.shape[:-1], num_experts)
    _check_values(indices, num_experts)
    if weights is not None:
        if weights.shape != indices.shape or not weights.is_floating_point():
            raise ValueError(
                "weights: expected floating point numbers of the shape of indices, got"
                f" {tuple(weights.shape)}, {weights.dtype}."
            )
        _check_signs("weights", weights)
    rows_per_sample = _rows_per_sample(rows_per_sample, indices)
    indices, kept = _with_sentinel(indices.flatten(0, -2).long(), num_experts)
    weights = kept / indices.shape[-1] if weights is None else weights.flatten(0, -2)
    finite = weights.isfinite().all(-1, keepdim=True)
    kept = kept & (weights != 0)
    indices, weights, drops = torch.where(kept, indices, num_experts), torch.where(kept, weights, 0), _has_any(~kept)
    logits = torch.where(finite, 0.0, torch.nan).to(weights.dtype).expand(-1, num_experts)
    unknown = torch.full_like(logits[:, :1], torch.nan).expand(-1, num_experts)
    return {
        "logits": logits,
        "probs": unknown,
        "indices": indices,
        "weights": weights,
        "scores": unknown,
        "drops": drops,
        "rows_per_sample": rows_per_sample,
    }


def _confirmed(scores: Tensor | None, probs: Tensor, logits: Tensor, indices: Tensor, drops: bool) -> Tensor | None:
    """Return the scores (None for the logits) if every row chose its highest ones, else nan: the margin is unknown."""
    # logits that differ may round to the same probability, so rows are compared by what the router compared
    compared = probs if scores is None else scores
    if can_read_without_sync(compared) and bool((surplus_of_choices(compared, indices, drops) >= 0).all()):
        return scores
    is_confirmed = (consistent_rows(compared, indices, drops) | ~logits.isfinite().all(-1)).all()
    unknown = logits.new_full((), torch.nan).expand_as(logits)
    if can_read_without_sync(is_confirmed):
        return scores if is_confirmed else unknown
    return torch.where(is_confirmed, logits if scores is None else scores, unknown)


def _rows_per_sample(given: int | None, values: Tensor) -> int:
    """Return T as given, or that of (B, T, ...)."""
    num_rows = values.shape[:-1].numel()
    if given is None:
        return max(values.shape[1], 1) if values.dim() == 3 else 1
    if given < 1 or num_rows % given:
        raise ValueError(f"rows_per_sample: expected a divisor of the {num_rows} rows, got {given}.")
    return given


def _with_sentinel(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the choices (N, K) with E for those that were dropped, and the mask of the others."""
    kept = (indices >= 0) & (indices < num_experts)
    return torch.where(kept, indices, num_experts), kept


def _has_any(dropped: Tensor) -> bool:
    """Return whether a choice was dropped, or True where the host cannot know it."""
    return not can_read_without_sync(dropped) or bool(dropped.any())


def _check_form(indices: Tensor, rows: torch.Size, num_experts: int) -> None:
    is_whole = not indices.is_floating_point() and indices.dtype != torch.bool
    if indices.shape[:-1] != rows or not is_whole or not 1 <= indices.shape[-1] <= num_experts:
        raise ValueError(
            f"indices: expected integers of shape {tuple(rows)} and one more dimension of size 1 to {num_experts}, got"
            f" {tuple(indices.shape)}, {indices.dtype}."
        )


def _check_values(indices: Tensor, num_experts: int) -> None:
    if not can_read_without_sync(indices) or not indices.numel():
        return
    lowest, highest = (int(bound) for bound in indices.aminmax())
    if lowest < -1 or highest > num_experts:
        raise ValueError(
            f"indices: expected 0 to {num_experts - 1}, or -1 or {num_experts} for a choice that was dropped, got"
            f" {lowest} to {highest}."
        )
    ordered = torch.where(indices == -1, num_experts, indices).sort(-1).values
    if bool(((ordered.diff() == 0) & (ordered[..., 1:] < num_experts)).any()):
        raise ValueError("indices: expected every expert at most once per row, got rows with a repeated expert.")


def _check_signs(name: str, values: Tensor, advice: str = "") -> None:
    if can_read_without_sync(values) and bool((values < 0).any()):
        raise ValueError(f"{name}: expected numbers of at least 0, got {float(values.min()):.3g}.{advice}")
