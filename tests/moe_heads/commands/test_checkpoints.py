from pathlib import Path

import pytest
import torch

from moe_heads.commands.checkpoints import load_model
from moe_heads.commands.errors import CommandError
from tests.support.checkpoint_models import Model

MODULE = "tests.support.checkpoint_models"


class Extra:
    """An object that is no plain data."""


@pytest.fixture
def unsafe(tmp_path: Path) -> Path:
    path = tmp_path / "unsafe.ckpt"
    torch.save({"state_dict": Model().state_dict(), "extra": Extra()}, path)
    return path


def test_other_objects_are_loaded_on_request_only(unsafe: Path) -> None:
    with pytest.raises(CommandError, match=r"got .* with .*Extra.*: add --unpickle if you trust the file"):
        load_model(f"{MODULE}:build", unsafe)
    loaded = load_model(f"{MODULE}:build", unsafe, unpickle=True)
    assert len(loaded.unpickled) == 1 and loaded.unpickled[0].endswith("Extra")


def test_a_function_need_not_load_the_weights(tmp_path: Path) -> None:
    saved = Model()
    torch.save(saved.state_dict(), tmp_path / "plain.pt")
    for name in ("build", "build_loaded"):
        model = load_model(f"{MODULE}:{name}", tmp_path / "plain.pt").model
        assert all(map(torch.equal, model.state_dict().values(), saved.state_dict().values()))


def test_a_file_without_tensors_is_an_error(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    with pytest.raises(CommandError, match="--ckpt: expected a state dict"):
        load_model(f"{MODULE}:build", tmp_path / "empty.pt")


def test_a_checkpoint_of_another_class_names_the_misfit(tmp_path: Path) -> None:
    model = Model(7)
    state = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}
    torch.save(state, tmp_path / "wide.ckpt")
    with pytest.raises(
        CommandError, match=r"--model: expected a checkpoint of .*Model, .* size mismatch for first.weight"
    ):
        load_model(f"{MODULE}:Model", tmp_path / "wide.ckpt")


def test_equal_weights_have_equal_digests(tmp_path: Path) -> None:
    model = Model()
    torch.save(model.state_dict(), tmp_path / "one.pt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "other.pt")
    one, other = (load_model(f"{MODULE}:build", tmp_path / name) for name in ("one.pt", "other.pt"))
    assert one.weights_digest == other.weights_digest and one.checkpoint_digest != other.checkpoint_digest
