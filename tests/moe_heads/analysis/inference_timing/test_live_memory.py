import torch
from torch import Tensor, nn

from moe_heads.analysis.inference_timing.counting import Recorder
from moe_heads.analysis.inference_timing.live_memory import LiveMemory, num_bytes


def peak_of(call: object) -> int:
    recorder = Recorder()
    with torch.inference_mode(), recorder:
        call()  # type: ignore[operator]
    return recorder.memory.peak


def test_the_peak_is_that_of_what_is_alive_at_once_weights_and_inputs_apart() -> None:
    chain, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))), torch.randn(8, 64)
    # the input of a layer beside its output, however many layers
    assert peak_of(lambda: chain(x)) == 2 * x.nbytes
    # three results are kept, views and work in place take nothing
    assert peak_of(lambda: [x + 1, (x + 2).relu_().view(-1), (x + 3)[:, :5]]) == 3 * x.nbytes


def test_a_temporary_that_no_module_returns_is_seen() -> None:
    q = torch.randn(2, 50, 4)

    def attention() -> Tensor:
        return (q @ q.transpose(1, 2)).softmax(-1) @ q

    scores = 2 * 50 * 50 * 4
    assert peak_of(attention) >= 2 * scores


def test_what_is_freed_is_taken_off() -> None:
    memory, x = LiveMemory(), torch.zeros(4)
    made = x + 1
    memory.add([x], [made])
    del made
    memory.add([x], [x + 2])
    assert memory.peak == x.nbytes


def test_bytes_of_dense_and_sparse_tensors() -> None:
    assert num_bytes(torch.zeros(3, 5)) == 60
    assert num_bytes(torch.eye(4).to_sparse()) == 4 * (4 + 2 * 8)
