"""CIFAR-10 data module, tested on a small archive with the layout of the real one."""

import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from moe_heads.lightning_modules import CIFAR10DataModule

NUM_PER_BATCH = 40


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny archive, served on this machine."""
    rng = np.random.default_rng(0)
    path = tmp_path / "server" / CIFAR10.filename
    path.parent.mkdir()
    sums: dict[str, str] = {}
    with tarfile.open(path, "w:gz") as tar:
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
        for name in names:
            labels = (np.arange(NUM_PER_BATCH) % 10).tolist()
            pixels = rng.integers(0, 256, (NUM_PER_BATCH, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": labels}
            if name == "batches.meta":
                content = {"label_names": list(CIFAR10DataModule.class_names)}
            data = pickle.dumps(content)
            sums[name] = md5(data)
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(path.parent)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{path.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path.read_bytes()))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    yield path
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_then_splits(archive: Path, tmp_path: Path) -> None:
    data = CIFAR10DataModule(str(tmp_path / "new" / "data"))
    data.prepare_data()
    data.setup("fit")
    assert [entry.name for entry in data.data_dir.iterdir()] == [CIFAR10.base_folder]
    assert [len(data.analysis_dataset(split)) for split in ("train", "val", "test")] == [180, 20, 40]
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (20, *data.image_shape)
    assert labels.bincount().tolist() == [2] * data.num_classes


def test_pixels_are_those_of_torchvision_normalized_as_in_the_study(archive: Path, tmp_path: Path) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    data.setup()
    reference = CIFAR10(tmp_path, train=False)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
    images: Any = data.analysis_dataset("test")
    for (image, label), (picture, expected_label) in zip(images, reference, strict=True):
        expected = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(image, expected)
        assert int(label) == expected_label


def test_training_images_are_crops_and_flips(archive: Path, tmp_path: Path) -> None:
    data = CIFAR10DataModule(str(tmp_path), limit_train=1, batch_size=1)
    plain = data.analysis_dataset("train")[0][0]
    black = ((0 - torch.tensor(data.mean)) / torch.tensor(data.std)).view(3, 1, 1)
    padded = black.repeat(1, 40, 40)
    padded[:, 4:36, 4:36] = plain
    crops = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    num_mirrored = 0
    places = set()
    for _ in range(24):
        image = next(iter(data.train_dataloader()))[0][0]
        straight = [i for i, crop in enumerate(crops) if torch.allclose(image, crop, atol=1e-6)]
        mirrored = [i for i, crop in enumerate(crops) if torch.allclose(image, crop.flip(-1), atol=1e-6)]
        assert len(straight) + len(mirrored) == 1
        num_mirrored += len(mirrored)
        places.update(straight + mirrored)
    assert 4 < num_mirrored < 20
    assert len(places) > 12


def test_an_archive_put_into_the_folder_is_used(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", CIFAR10.url + ".gone")
    folder = tmp_path / "data"
    folder.mkdir()
    archive.rename(folder / archive.name)
    CIFAR10DataModule(str(folder)).prepare_data()
    assert sorted(entry.name for entry in folder.iterdir()) == [CIFAR10.base_folder, CIFAR10.filename]


@pytest.mark.parametrize("exists", [True, False])
def test_failed_download_says_where_the_archive_goes_and_leaves_nothing(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    monkeypatch.setattr(CIFAR10, "url", CIFAR10.url + ".gone")
    folder = tmp_path / "data"
    if exists:
        folder.mkdir()
    with pytest.raises(
        RuntimeError, match=rf"could not be downloaded to {folder}: .* put {CIFAR10.filename} .*into that"
    ):
        CIFAR10DataModule(str(folder)).prepare_data()
    assert folder.exists() == exists
    assert not exists or not list(folder.iterdir())


def test_truncated_download_leaves_nothing(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="CIFAR-10 could not be downloaded"):
        CIFAR10DataModule(str(tmp_path / "data")).prepare_data()
    assert not (tmp_path / "data").exists()


def test_damaged_archive_in_the_folder(archive: Path, tmp_path: Path) -> None:
    (tmp_path / CIFAR10.filename).write_bytes(b"half")
    with pytest.raises(RuntimeError, match=rf"{CIFAR10.filename} is damaged .*\. Delete or replace it"):
        CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert (tmp_path / CIFAR10.filename).read_bytes() == b"half"


def test_damaged_folder(archive: Path, tmp_path: Path) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    (tmp_path / CIFAR10.base_folder / "data_batch_3").unlink()
    with pytest.raises(RuntimeError, match=rf"{CIFAR10.base_folder} is incomplete or damaged\. Delete it"):
        data.setup()


def test_folder_that_cannot_be_made(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match="CIFAR-10 could not be downloaded to"):
        CIFAR10DataModule(str(tmp_path / "file" / "data")).prepare_data()


def test_sizes_of_the_study() -> None:
    data = CIFAR10DataModule()
    assert (data.batch_size, data.val_split, data.seed, data.augment) == (128, 0.1, 42, True)
