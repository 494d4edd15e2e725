"""How the experts of a trained model are used: by how many samples, with which weight, for which classes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import (
    Batch,
    ForwardFn,
    call_model,
    labels_of,
)
from moe_heads.analysis._shared.copies import on_copies, own_copy
from moe_heads.analysis._shared.counting import BatchSizeFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.preserve import analysis_mode
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.ablation import AblationHits, ablated_heads, ablation_hits
from moe_heads.analysis.expert_utilization.examples import images_by, images_of
from moe_heads.analysis.expert_utilization.labels import (
    check_class_names,
    labels_by,
    names_of_classes,
    num_classes_of,
)
from moe_heads.analysis.expert_utilization.result import ExpertUtilizationResult
from moe_heads.analysis.expert_utilization.rows import of_samples
from moe_heads.analysis.expert_utilization.sums import ReportOptions, UtilizationSums
from moe_heads.checks import check_at_least, check_flags, check_seed, check_shares
from moe_heads.routing import Adapters, Routing, adapted_routers, collect_routing, named_routers

__all__ = ["checked_options", "expert_utilization"]


def expert_utilization(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    forward_fn: ForwardFn = call_model,
    label_fn: Callable[[Batch], Tensor | None] = labels_of,
    image_fn: Callable[[Batch], Tensor | None] = images_of,
    adapters: Adapters | None = None,
    dead_below: float = 0.01,
    starved_below: float = 0.25,
    num_permutations: int = 200,
    num_examples: int = 0,
    ablation: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
) -> ExpertUtilizationResult:
    """Who does what among the experts of every router inside the model: load, weight, classes, and what they show.

    One pass over the data in evaluation mode (no noise on the router), without gradients; sums are taken in float64.
    Rows whose router logits are not finite count in nothing but ``num_nonfinite``. The model is evaluated inside
    `analysis_mode` and left bit for bit as it was, also after an error.

    Args:
        model: The model. One without a router of ours is not run and gives a result without heads.
        batches: The data.
        num_classes: C; by default the number of ``class_names``, else the largest label plus one. Labels that would
            make more than a thousand classes, and more than there are samples, are then taken for no classes.
        class_names: Names of the classes for figures and tables.
        forward_fn: ``forward_fn(model, batch)`` runs the model; its output is not used.
        label_fn: ``label_fn(batch) -> labels (B,)``, or None for data without labels: then there is no class map. A
            label of -100 marks a sample without a class, as for `torch.nn.functional.cross_entropy`: it counts in all
            but what is told of classes. By default the second entry of a batch, or "labels"; see `labels_of`.
        image_fn: ``image_fn(batch) -> images (B, C, H, W)`` with one channel or three, or None; by default the first
            entry of a batch, where it has this form.
        adapters: For routers that are not of this package; see `collect_routing`. Rows that are a multiple of the
            samples are taken for the tokens of one sample after the other.
        dead_below: An expert is dead when its load is below this fraction of the fair share 1/E; for a soft router,
            which runs every expert, when its importance is. With 1 %, an expert with a single stray sample in a
            thousand is dead too.
        starved_below: An expert that is not dead is starved below this fraction of the fair share.
        num_permutations: Permutations of the labels that give the mutual information's level by chance and its
            p-value; 200 resolve 0.005 and cost some milliseconds for each thousand samples. 0 for none.
        num_examples: Images kept of the samples that each expert received with the highest gate.
        ablation: Whether to evaluate the accuracy without each expert too; see `moe_heads.ablate`. Needs labels and a
            model that returns logits; costs a pass of the head for each expert where the model returns the head's
            output, else a pass of the model.
        seed: Seed of the random number generators.
        progress: Shows the progress and ends the analysis when its time is over; see `Progress`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``; all of them call
            this function and get the result. By default this process has all samples.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default its tensors tell.

    Returns:
        The numbers by head; those of the samples so far when the time of the progress is over, marked by ``partial``.

    Raises:
        ValueError: If an option is out of range, the data is empty, labels are out of range, missing in some batches or
            do not fit the routed rows, no logit of a router is finite, or an ablation is asked for where it cannot be
            had.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.analysis.expert_utilization.function import expert_utilization
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), SparseMoE(16, 3, num_experts=4, expert_width=8))
        >>> batch = torch.randn(50, 4, 4), torch.randint(3, (50,))
        >>> result = expert_utilization(model, [batch])
        >>> result.load["1"].shape, result.class_map["1"].shape
        (torch.Size([4]), torch.Size([3, 4]))
    """
    check_class_names(class_names)
    check_flags(ablation=ablation)
    options = checked_options(dead_below, starved_below, num_permutations, num_examples, seed)
    progress, ranks, listed = progress or Progress(), ranks or Ranks(), Batches.of(batches, batch_size_fn)
    sums = _Sums(options)
    if not named_routers(model) and not adapted_routers(model, adapters):
        sums.num_samples = listed.num_samples
        return _result(ranks.gather(sums), names_of_classes(num_classes, class_names))
    with ranks.synchronized():
        found_labels = [labels_by(label_fn, own_copy(batch)) for batch in listed]
        num_classes = num_classes_of(found_labels, num_classes, class_names)
    num_classes = max((known for known in ranks.gather(num_classes) if known is not None), default=None)
    if ablation and num_classes is None:
        raise ValueError("ablation: expected labels, to tell the accuracy, got data without")
    names = names_of_classes(num_classes, class_names)
    with ranks.synchronized(), analysis_mode(model, seed), torch.no_grad():
        data = Microbatches(listed, device_of(model), progress)
        forward_fn = on_copies(forward_fn)
        foreign = adapted_routers(model, adapters)
        smaller = ablated_heads(model, _sizes(model)) if ablation else {}

        def route(index: int, batch: Batch) -> _Found:
            with collect_routing(model, adapters) as collection:
                forward_fn(model, batch)
            for name in foreign:
                collection.routings[name][:] = [
                    of_samples(routing, batch, data.sizes[index]) for routing in collection.routings[name]
                ]
            labels = labels_by(label_fn, own_copy(batch)) if num_classes is not None else None
            hits = {} if labels is None else ablation_hits(model, forward_fn, batch, labels, smaller)
            images = images_by(image_fn, own_copy(batch), data.sizes[index]) if num_examples else None
            return _Found(data.sizes[index], collection.routings, labels, images, hits)

        try:
            for _, found in data.evaluate(route, copies=False):
                sums.add(found, num_classes)
                progress.keep(lambda partial: _result([replace(sums, partial=partial)], names))
                progress.step(sums.num_samples, data.num_samples)
        except TimeUp:
            sums.partial = progress.end
    return _result(ranks.gather(sums), names)


def checked_options(
    dead_below: float, starved_below: float, num_permutations: int, num_examples: int, seed: int
) -> ReportOptions:
    """The options of the report, where they are in range."""
    check_shares(dead_below=dead_below, starved_below=starved_below)
    if starved_below < dead_below:
        raise ValueError(f"starved_below: expected at least dead_below = {dead_below}, got {starved_below}")
    check_seed(seed)
    check_at_least(0, num_permutations=num_permutations, num_examples=num_examples)
    return ReportOptions(dead_below, starved_below, num_permutations, num_examples, seed)


def _sizes(model: nn.Module) -> dict[str, int]:
    """Number of experts by head."""
    return {name: router.num_experts for name, router in named_routers(model).items()}


@dataclass
class _Found:
    """What one batch shows."""

    num_samples: int
    routings: dict[str, list[Routing]]
    labels: Tensor | None
    images: Tensor | None
    hits: dict[str, AblationHits]


@dataclass
class _Sums:
    """What one rank has found."""

    options: ReportOptions
    heads: dict[str, UtilizationSums] = field(default_factory=dict)
    num_samples: int = 0
    partial: str = ""

    def add(self, found: _Found, num_classes: int | None) -> None:
        labels = None if found.labels is None else found.labels.cpu()
        for name, passes in found.routings.items():
            if passes:
                wide = [_in_float64(routing) for routing in passes]
                head = self.heads.setdefault(name, UtilizationSums(name, wide[0], num_classes, self.options))
                head.add(wide, labels, found.images, found.hits.get(name))
        self.num_samples += found.num_samples


def _result(found: Sequence[_Sums], names: tuple[str, ...]) -> ExpertUtilizationResult:
    """The result of all ranks."""
    partial = "; ".join(dict.fromkeys(sums.partial for sums in found if sums.partial))
    num_samples = sum(sums.num_samples for sums in found)
    if num_samples == 0:
        raise TimeUp(f"{partial} before there was a result")
    heads: dict[str, UtilizationSums] = {}
    for sums in found:
        for name, head in sums.heads.items():
            heads[name] = heads[name] + head if name in heads else head
    return ExpertUtilizationResult({name: head.result() for name, head in heads.items()}, names, num_samples, partial)


def _in_float64(routing: Routing) -> Routing:
    """What the sums need of a routing, on the CPU: (N, E) numbers are few, and a sum of millions needs float64."""
    return replace(
        routing,
        logits=routing.logits.cpu().double(),
        probs=routing.probs.cpu().double(),
        indices=None if routing.indices is None else routing.indices.cpu(),
        rows=None if routing.rows is None else routing.rows.cpu(),
        scores=None if routing.scores is None else routing.scores.cpu().double(),
        noisy_logits=None,
        weights=None if routing.weights is None else routing.weights.cpu().double(),
    )
