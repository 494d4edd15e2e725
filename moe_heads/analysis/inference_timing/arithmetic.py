"""Floating point operations of everything that is timed at a batch size."""

from moe_heads.analysis.inference_timing.calls import MODEL
from moe_heads.analysis.inference_timing.heads import active_flops
from moe_heads.analysis.inference_timing.row import Flops
from moe_heads.analysis.inference_timing.subject import Subject, Taken

__all__ = ["flops_of"]


def flops_of(subject: Subject, taken: Taken) -> dict[str, Flops]:
    """Operations by the name of the rows: as recorded, but of a head with a router and of its twin by their formula.

    A sparse head may run more experts than it chooses: what contains one counts those that are chosen.

    Args:
        subject: What is timed.
        taken: What its forward pass showed.
    """
    counted, calls = taken.captured.counted, taken.captured.calls
    heads = {name: head for name, head in subject.all_heads.items() if name in calls}
    chosen = {name: active_flops(head, calls[name]) for name, head in heads.items()}
    found = {}
    for name, whole in counted.items():
        inside = [head for head in heads if name == MODEL or head == name or head.startswith(f"{name}.")]
        outside = whole.flops - sum(counted[head].flops for head in inside)
        num_hidden = whole.num_hidden - sum(counted[head].num_hidden for head in inside)
        found[name] = Flops(outside + sum(chosen[head] for head in inside), num_hidden == 0)
    found |= {name: Flops(flops) for name, flops in chosen.items()}
    return found | {
        subject.twin_names[name]: Flops(active_flops(twin, calls[name]))
        for name, twin in subject.twins.items()
        if name in calls
    }
