from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from moe_heads.lightning_modules import ImageFiles, ImageTransform, LabeledImages

IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "max_value": 1.0}


def write_image(path: Path, height: int, width: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_normalization() -> None:
    images = torch.randint(0, 256, (4, 2, 3, 3), dtype=torch.uint8)
    result = ImageTransform(mean=(0.25, 0.5), std=(0.5, 2.0))(images)
    assert result.dtype == torch.float32
    expected = images.double() / 255
    expected[:, 0] = (expected[:, 0] - 0.25) / 0.5
    expected[:, 1] = (expected[:, 1] - 0.5) / 2.0
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


def test_each_image_gets_one_of_the_crops_and_all_crops_occur() -> None:
    padding = 1
    image = torch.arange(1, 1 + 3 * 4 * 5).reshape(1, 3, 4, 5).to(torch.uint8)
    padded = np.pad(image[0].numpy(), ((0, 0), (padding, padding), (padding, padding)))
    crops = {
        (top, left): torch.from_numpy(padded[:, top : top + 4, left : left + 5]).float()
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }
    result = ImageTransform(**IDENTITY, padding=padding)(image.repeat(1000, 1, 1, 1))
    matches = torch.stack([(result == crop).flatten(1).all(1) for crop in crops.values()], 1)
    assert matches.sum(1).eq(1).all()
    # 1000 draws from nine crops: each count within five standard deviations of 111
    assert (matches.sum(0) - 1000 / 9).abs().max() < 5 * (1000 / 9 * 8 / 9) ** 0.5


def test_half_of_the_images_are_mirrored_whole() -> None:
    image = torch.arange(3 * 4 * 5).reshape(1, 3, 4, 5).to(torch.uint8)
    result = ImageTransform(**IDENTITY, flip=True)(image.repeat(1000, 1, 1, 1))
    is_same = (result == image).flatten(1).all(1)
    is_mirrored = (result == image.flip(-1)).flatten(1).all(1)
    assert (is_same ^ is_mirrored).all()
    assert abs(int(is_mirrored.sum()) - 500) < 5 * 250**0.5


def test_batches_equal_single_samples() -> None:
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(10)
    data = LabeledImages(images, labels, ImageTransform(**IDENTITY))
    assert len(data) == 10
    batches = list(DataLoader(data, batch_size=4))
    assert [len(batch_labels) for _, batch_labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), images.float())
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert torch.equal(torch.stack([data[i][0] for i in range(10)]), images.float())
    assert [int(y) for _, y in Subset(data, [7, 3])] == [7, 3]


def test_a_batch_is_transformed_at_once() -> None:
    sizes: list[int] = []

    def transform(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return images.float()

    data = LabeledImages(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.zeros(10).long(), transform)
    list(DataLoader(data, batch_size=5))
    assert sizes == [5, 5]


def test_with_transform_shares_the_pixels_and_leaves_the_original_alone() -> None:
    images = torch.full((2, 1, 2, 2), 3, dtype=torch.uint8)
    plain = LabeledImages(images, torch.zeros(2).long(), lambda x: x.float())
    doubled = plain.with_transform(lambda x: 2 * x.float())
    assert doubled.images is plain.images
    assert plain[0][0].max() == 3
    assert doubled[0][0].max() == 6


def test_number_of_labels_is_checked() -> None:
    with pytest.raises(ValueError, match="labels: expected one for each of the 3 images, got 2"):
        LabeledImages(torch.zeros(3, 1, 2, 2), torch.zeros(2).long(), lambda x: x)


def test_files_are_decoded_when_indexed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    pixels = [write_image(path, 4, 6) for path in paths]
    files = ImageFiles(paths, height=4, width=6)
    assert len(files) == 3
    result = files[torch.tensor([2, 0])]
    assert result.dtype == torch.uint8
    assert torch.equal(result, torch.from_numpy(np.stack([pixels[2], pixels[0]])).permute(0, 3, 1, 2))
    assert files.select(torch.tensor([1])).paths == [paths[1]]
    data = LabeledImages(files, torch.tensor([0, 1, 2]), ImageTransform(**IDENTITY))
    assert torch.equal(next(iter(DataLoader(data, 3)))[0], files[torch.arange(3)].float())


def test_grey_files_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 77, dtype=np.uint8)).save(tmp_path / "gray.png")
    result = ImageFiles([tmp_path / "gray.png"], 2, 2)[torch.tensor([0])]
    assert torch.equal(result, torch.full((1, 3, 2, 2), 77, dtype=torch.uint8))


def test_resizing_keeps_the_aspect_ratio_and_cuts_out_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    result = ImageFiles([tmp_path / "wide.png"], 4, 4, resize=True)[torch.tensor([0])]
    assert torch.equal(result, torch.full((1, 3, 4, 4), 200, dtype=torch.uint8))


def test_another_size_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "odd.png", 4, 6)
    with pytest.raises(
        ValueError, match=r"odd\.png: expected 4x4 pixels as in the first image, got 6x4\. Pass image_size"
    ):
        ImageFiles([tmp_path / "odd.png"], 4, 4)[torch.tensor([0])]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "cut.png", 16, 16)
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name}: expected a readable image, got an error: "):
            ImageFiles([tmp_path / name], 16, 16)[torch.tensor([0])]


@pytest.mark.parametrize("padding", [1, 3])
def test_reflected_border_is_that_of_torch(padding: int) -> None:
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(torch.uint8)
    whole = torch.nn.functional.pad(images.double(), (padding,) * 4, mode="reflect")
    windows = whole.unfold(2, 4, 1).unfold(3, 5, 1).flatten(2, 3)  # every crop that there is
    result = ImageTransform(**IDENTITY, padding=padding, border="reflect")(images).double()
    for crop, possible in zip(result, windows, strict=True):
        assert (possible.movedim(1, 0) == crop).flatten(1).all(1).any()


def test_a_border_wider_than_the_image_cannot_be_its_mirror() -> None:
    transform = ImageTransform(**IDENTITY, padding=4, border="reflect")
    with pytest.raises(ValueError, match=r"padding: expected less than the side of the image .* got 4"):
        transform(torch.zeros(1, 3, 8, 4, dtype=torch.uint8))


def test_unknown_border_is_refused() -> None:
    with pytest.raises(ValueError, match="border: expected one of 'black', 'reflect', got 'white'"):
        ImageTransform(**IDENTITY, border="white")
