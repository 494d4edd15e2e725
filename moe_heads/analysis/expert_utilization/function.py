"""Utilization of the experts of a trained model: number of samples, mixing weight, and classes of each expert."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, ForwardFn, call_model
from moe_heads.analysis._shared.copies import on_copies, own_copy
from moe_heads.analysis._shared.counting import BatchSizeFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.in_step import in_step, ranks_of, work_in_step
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.names import check_names
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import CHECKPOINT_REMEDY, is_sharded
from moe_heads.analysis.expert_utilization.ablation import AblationCounts, ablated_heads, count_ablation
from moe_heads.analysis.expert_utilization.classes import Classes, check_class_names, checked_ignore_index, classes_of
from moe_heads.analysis.expert_utilization.examples import images_of, read_images
from moe_heads.analysis.expert_utilization.expert_outputs import MAX_ROWS, OutputNorms, OutputProbes
from moe_heads.analysis.expert_utilization.inert import INERT_BELOW, function_fields
from moe_heads.analysis.expert_utilization.label_entry import labels_of
from moe_heads.analysis.expert_utilization.labels import BatchLabels, LabelFn, reason_of
from moe_heads.analysis.expert_utilization.result import ExpertUtilizationResult
from moe_heads.analysis.expert_utilization.router_notes import RouterNotes, UnknownRouterWarning
from moe_heads.analysis.expert_utilization.samples import group_by_sample
from moe_heads.analysis.expert_utilization.sums import ReportOptions, UtilizationSums
from moe_heads.analysis.expert_utilization.token_masks import MaskFn, TokenMasks
from moe_heads.checks import check_at_least, check_at_least_one, check_callables, check_flags, check_shares
from moe_heads.routing import Adapters, Routing, adapted_routers, collect_routing, named_routers
from moe_heads.routing.recognition.expert_layers import expert_layers

__all__ = ["checked_options", "expert_utilization"]


def expert_utilization(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    forward_fn: ForwardFn = call_model,
    label_fn: LabelFn = labels_of,
    ignore_index: int | Collection[int] | None = None,
    image_fn: Callable[[Batch], Tensor | None] = images_of,
    adapters: Adapters | None = None,
    mask_fn: MaskFn | None = None,
    dead_below: float = 0.01,
    starved_below: float = 0.25,
    inert_below: float = INERT_BELOW,
    num_permutations: int = 200,
    num_examples: int = 0,
    ablation: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
) -> ExpertUtilizationResult:
    """Measure the utilization of the experts of every router inside the model: load, importance and classes.

    The function makes one pass over the data in evaluation mode (without router noise), without gradients. Sums are
    float64. Rows with non-finite router logits count only in ``num_nonfinite``. The model is evaluated inside
    `analysis_mode` and is bit for bit unchanged afterwards, also after an error.

    Args:
        model: The model. A model without a router is not run and gives a result without heads.
        batches: The data.
        num_classes: C. The default is the number of ``class_names``, else the largest label plus one. Labels that would
            imply more than a thousand classes, and more classes than samples, are then not treated as classes (for
            labels of tokens: more than a thousand).
        class_names: Names of the classes for figures and tables.
        forward_fn: ``forward_fn(model, batch)`` runs the model. Its output is used for the ablation only.
        label_fn: ``label_fn(batch) -> labels``, integers: (B,) for samples, (B, T) for their tokens, or (R,) for the
            rows of the router. None for data without classes. The default is the second entry of a pair, or the entry
            or attribute "labels", "label", "y", "target" or "targets". Quantities without classes do not depend on the
            labels. If labels cannot be used, the quantities of classes are missing and the ``no_classes`` of the result
            states the reason. An error of ``label_fn`` is such a reason too.
        ignore_index: Labels of samples (or tokens) without a class, in addition to all negative ones. They count in all
            quantities except those of the classes. Labels of 255, or of the largest value of their data type, are
            ignored too unless the labels below them are also in use. The summary lists all ignored labels.
        image_fn: ``image_fn(batch) -> images (B, C, H, W)`` with one or three channels, or None. The default is the
            first entry of a batch, if it has this format.
        adapters: For routers that are not recognized. See `collect_routing`. If the number of rows is a multiple of the
            number of samples, the rows are treated as the consecutive tokens of the samples.
        mask_fn: ``mask_fn(batch) -> mask (B, T)``, bool, True for real tokens, or None. Padding then counts in no
            quantity. The default is the entry "attention_mask" of a batch, if it is a tensor of two dimensions.
        dead_below: An expert is dead if its load is below this fraction of the fair share 1/E. For a soft router, which
            runs every expert, the importance is compared instead. With 1 %, an expert with a single stray sample in a
            thousand is dead too.
        starved_below: An expert that is not dead is starved below this fraction of the fair share.
        inert_below: An expert that is not dead is inert if the norm of its output on 1,024 rows is below this fraction
            of the median of the layer. Where outputs are not known, the norm of its weights is compared. 3 % lies
            between healthy and broken experts (docs/results.md, Inert experts).
        num_permutations: Number of label permutations for the chance level of the mutual information and its p-value.
            200 resolve 0.005 and cost some milliseconds per thousand samples. 0 omits both.
        num_examples: Number of images to keep per expert, those with the highest gates.
        ablation: Whether to also evaluate the accuracy without each expert. See `moe_heads.ablate`. It needs labels and
            a model that returns logits. It costs one pass of the head per expert if the model returns the output of the
            head, else one pass of the model per expert.
        seed: Seed of the random number generators.
        progress: Progress display and time limit. See `Progress`.
        ranks: Processes that share the work, each with its part of the samples in ``batches``. All of them must call
            this function, and all get the result. By default this process has all samples.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch. By default it is read from the
            tensors.

    Returns:
        The numbers by head. After a timeout they cover the samples so far and are marked by ``partial``.

    Raises:
        ValueError: If an option is out of range, the data is empty, no logit of a router is finite, or the ablation is
            not possible.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.analysis import expert_utilization
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), SparseMoE(16, 3, num_experts=4, expert_width=8))
        >>> batch = torch.randn(50, 4, 4), torch.randint(3, (50,))
        >>> result = expert_utilization(model, [batch])
        >>> result.load["1"].shape, result.class_map["1"].shape
        (torch.Size([4]), torch.Size([3, 4]))
    """
    check_arguments(model=model, forward_fn=forward_fn, label_fn=label_fn, image_fn=image_fn, seed=seed)
    check_arguments(progress=progress, ranks=ranks, batch_size_fn=batch_size_fn)
    check_callables(mask_fn=mask_fn)
    check_at_least_one(or_none=True, num_classes=num_classes)
    check_names(class_names=class_names)
    check_class_names(num_classes, class_names)
    check_flags(ablation=ablation)
    ignored = checked_ignore_index(ignore_index)
    options = checked_options(dead_below, starved_below, num_permutations, num_examples, seed, inert_below)
    progress, ranks, listed = progress or Progress(), ranks_of(model, ranks), Batches.of(batches, batch_size_fn)
    work_in_step(model, listed, ranks)
    if ablation and is_sharded(model):
        raise ValueError(f"ablation: expected False for a sharded model, got True. {CHECKPOINT_REMEDY}.")
    sums = _Sums(options)
    if not named_routers(model) and not adapted_routers(model, adapters) and not expert_layers(model):
        sums.num_samples = listed.num_samples
        return _result(model, {}, ranks.gather(sums), Classes.of(num_classes, class_names))
    classes = classes_of(label_fn, listed, ranks, num_classes, class_names, ignored)
    if ablation and not (classes.num_classes and classes.per_sample):
        reason = classes.reason.text if classes.reason else "The labels are those of tokens or rows."
        raise ValueError(f"ablation: expected data with labels for the accuracy, got none. {reason}")
    with ranks.synchronized(), analysis_mode(model, seed), torch.no_grad(), ExitStack() as hooks:
        watched = in_step(model, progress, ranks)
        data = Microbatches(listed, device_of(model), watched)
        forward_fn = on_copies(forward_fn)
        foreign, masks = adapted_routers(model, adapters), TokenMasks.of(model, mask_fn)
        router_notes = RouterNotes({name: a for name, (_, a) in foreign.items()})
        smaller = ablated_heads(model, _sizes(model)) if ablation else {}
        routers = {**named_routers(model), **{name: router for name, (router, _) in foreign.items()}}
        probes = OutputProbes(model, routers, -(-MAX_ROWS // ranks.size))
        # one for all batches: what is found out about a router does not change between them
        collection = hooks.enter_context(collect_routing(model, adapters))

        def route(index: int, batch: Batch) -> _BatchRecord:
            num_done = {name: norms.num_rows for name, norms in sums.outputs.items()}
            masks.begin(batch)
            collection.restart()
            with probes.listening(num_done):
                forward_fn(model, batch)
            collection.paused = True
            sums.notes.extend(router_notes.after_pass(collection, masks))
            sums.only_here |= set(collection.only_here)
            routings = masks.applied(collection.routings)
            outputs = probes.norms(routings, num_done)
            for name in routings.keys() & foreign.keys():
                routings[name] = [group_by_sample(r, batch, data.sizes[index]) for r in routings[name]]
            labels = classes.read(label_fn, own_copy(batch))
            counts = {}
            if labels.values is not None and smaller:
                counts = count_ablation(model, forward_fn, batch, labels.values, smaller)
            images = read_images(image_fn, own_copy(batch), data.sizes[index]) if num_examples else None
            return _BatchRecord(data.sizes[index], routings, labels, images, counts, outputs)

        try:
            for _, record in data.evaluate(route, copies=False):
                sums.add(record, classes)
                progress.keep(lambda partial: _result(model, routers, [replace(sums, partial=partial)], classes))
                watched.step(sums.num_samples, data.num_samples)
        except TimeUp:
            sums.partial = progress.end
        for name, head in sums.heads.items():
            sums.notes.extend(router_notes.after_count(name, head.stats))
    result = _result(model, routers, ranks.gather(sums), classes)
    for note in result.notes:
        warnings.warn(note, UnknownRouterWarning, stacklevel=2)
    return result


def checked_options(
    dead_below: float,
    starved_below: float,
    num_permutations: int,
    num_examples: int,
    seed: int,
    inert_below: float = INERT_BELOW,
) -> ReportOptions:
    """Check the ranges of the options of the report, and return them."""
    check_shares(dead_below=dead_below, starved_below=starved_below, inert_below=inert_below)
    if starved_below < dead_below:
        raise ValueError(f"starved_below: expected at least dead_below = {dead_below}, got {starved_below}.")
    check_at_least(0, num_permutations=num_permutations, num_examples=num_examples)
    return ReportOptions(dead_below, starved_below, num_permutations, num_examples, seed, inert_below)


def _sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of experts by head."""
    return {name: router.num_experts for name, router in named_routers(model).items()}


@dataclass
class _BatchRecord:
    """Routings, labels, images, ablation counts and output norms of one batch."""

    num_samples: int
    routings: dict[str, list[Routing]]
    labels: BatchLabels
    images: Tensor | None
    counts: dict[str, AblationCounts]
    outputs: dict[str, OutputNorms]


@dataclass
class _Sums:
    """Sums of one rank."""

    options: ReportOptions
    heads: dict[str, UtilizationSums] = field(default_factory=dict)
    outputs: dict[str, OutputNorms] = field(default_factory=dict)
    num_samples: int = 0
    partial: str = ""
    notes: list[str] = field(default_factory=list)
    only_here: set[str] = field(default_factory=set)

    def add(self, record: _BatchRecord, classes: Classes) -> None:
        for name, passes in record.routings.items():
            if passes:
                wide = [_in_float64(routing) for routing in passes]
                head = self.heads.setdefault(name, UtilizationSums(name, wide[0], classes, self.options))
                head.add(wide, record.labels, record.images, record.counts.get(name))
        for name, norms in record.outputs.items():
            self.outputs[name] = self.outputs[name] + norms if name in self.outputs else norms
        self.num_samples += record.num_samples


def _result(
    model: nn.Module, routers: Mapping[str, nn.Module], found: Sequence[_Sums], classes: Classes
) -> ExpertUtilizationResult:
    """Merge the sums of all ranks into the result, and add what the weights tell."""
    partial = "; ".join(dict.fromkeys(sums.partial for sums in found if sums.partial))
    num_samples = sum(sums.num_samples for sums in found)
    if num_samples == 0:
        raise TimeUp(f"{partial} before there was a result")
    only_here = {name for sums in found for name in sums.only_here}
    heads: dict[str, UtilizationSums] = {}
    for sums in found:
        for name, head in sums.heads.items():
            if name not in heads:
                heads[name] = head
            elif name not in only_here:
                heads[name] = heads[name] + head
    results = {name: head.result() for name, head in heads.items()}
    for name, result in results.items():
        outputs = [sums.outputs[name] for sums in found if name in sums.outputs]
        fields = function_fields(model, routers[name], result, outputs, found[0].options.inert_below)
        results[name] = replace(result, **fields)
    reason = classes.reason or reason_of([head.no_classes for head in heads.values()])
    return ExpertUtilizationResult(
        results,
        classes.names,
        num_samples,
        partial,
        no_classes=reason.text if reason else "",
        has_odd_labels=reason is not None and reason.is_odd,
        ignored_labels=classes.ignored,
        notes=tuple(dict.fromkeys(note for sums in found for note in sums.notes)),
    )


def _in_float64(routing: Routing) -> Routing:
    """Copy a routing to the CPU, in float64 and without noise: sums of millions of rows need the precision."""
    without_noise = replace(routing, noisy_logits=None, noise_std=None, slot_logits=None)
    return without_noise.map(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu())
