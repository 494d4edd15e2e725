"""Figure of the samples that each expert receives."""

import torch

from moe_heads.analysis.expert_utilization.example_grid import plot_examples
from moe_heads.analysis.expert_utilization.examples import ExpertExamples


def test_every_image_stands_in_its_expert_s_row_below_its_class_and_gate() -> None:
    images = torch.arange(1, 7, dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 6)
    gates = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.0, 0.0]])
    figure = plot_examples(
        ExpertExamples(images, gates, torch.tensor([[0, 1, 2], [-1, 0, 0]])), ["cat", "dog"], torch.tensor([0.7, 0.3])
    )
    (ax,) = figure.axes
    (drawn,) = ax.images
    sheet = torch.tensor(drawn.get_array()[..., 0])
    for place in range(1, 5):
        rows, columns = (sheet == place).nonzero(as_tuple=True)
        assert len(rows) == 4 * 6  # whole, and in one piece
        assert int(rows.max() - rows.min()) == 3 and int(columns.max() - columns.min()) == 5
    assert not ((sheet == 5) | (sheet == 6)).any()  # an expert that received one image shows one
    warned = {text.get_text(): text.get_position() for text in ax.texts}
    assert warned.keys() == {"0", "1", "cat\n0.90", "dog\n0.80", "2\n0.70", "0.60"}
    assert warned["cat\n0.90"][1] == warned["dog\n0.80"][1] < warned["0.60"][1]
    assert warned["cat\n0.90"][0] < warned["dog\n0.80"][0] < warned["2\n0.70"][0]


def test_grey_images() -> None:
    images = torch.full((1, 1, 1, 8, 8), 7, dtype=torch.uint8)
    figure = plot_examples(ExpertExamples(images, torch.ones(1, 1), torch.tensor([[3]])), [], torch.ones(1))
    (drawn,) = figure.axes[0].images
    assert int((torch.tensor(drawn.get_array()) == 7).all(-1).sum()) == 64


def test_experts_without_a_sample_are_named_and_take_no_room() -> None:
    images, gates = torch.zeros(3, 3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 3)
    gates[1] = torch.tensor([0.9, 0.8, 0.0])
    figure = plot_examples(ExpertExamples(images, gates, torch.full((3, 3), -1)), [], torch.tensor([0.0, 1.0, 0.0]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "0.90", "0.80"]
    assert [text.get_text() for text in figure.texts] == ["no sample: 0, 2"]
    empty = ExpertExamples(images, torch.zeros(3, 3), torch.full((3, 3), -1))
    assert [t.get_text() for t in plot_examples(empty, [], torch.ones(3) / 3).texts] == ["no sample: 0, 1, 2"]


def test_of_many_experts_those_with_the_highest_load_are_shown() -> None:
    load = torch.arange(40, 0, -1).double().roll(5)  # expert 5 has most
    images = torch.zeros(40, 1, 3, 8, 8, dtype=torch.uint8)
    examples = ExpertExamples(images, torch.ones(40, 1), torch.full((40, 1), -1))
    figure = plot_examples(examples, [], load)
    assert [text.get_text() for text in figure.axes[0].texts][::2] == [str(expert) for expert in range(5, 37)]
    assert " ".join(figure.texts[0].get_text().split()) == "the 32 experts of 40 with the highest load"


def test_a_long_name_goes_over_lines_and_costs_no_dollar() -> None:
    labels = torch.tensor([[0, 1, 2]])
    examples = ExpertExamples(torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 3), labels)
    names = ["golden retriever", "$5\n$6", "an unconscionably long name of a class"]
    figure = plot_examples(examples, names, torch.ones(1))
    warned = [text.get_text() for text in figure.axes[0].texts][1:]
    assert warned[:2] == ["golden\nretriever\n1.00", r"\$5 \$6" + "\n1.00"]
    assert warned[2].splitlines()[-2].endswith("…") and len(warned[2].splitlines()) == 4
