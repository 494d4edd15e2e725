"""LightningCLI with the configurations of the repository."""

from pathlib import Path

import pytest

from moe_heads.callbacks import FitEndAnalysis
from tests.support.sources import ROOT


# raised inside LightningCLI
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
# after a few batches an expert may well starve
@pytest.mark.filterwarnings("ignore:expert_utilization. epoch")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path.name, marks=[] if path.stem == "sparse_moe" else [pytest.mark.slow])  # 20 s each
        for path in sorted((ROOT / "examples" / "configs").glob("*.yaml"))
    ],
)
def test_config_builds_its_callbacks_and_trains(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train

    # CIFAR-10 and ResNet-18 give way to what is at hand and quick
    overrides = [
        "--data=moe_heads.lightning_modules.DigitsDataModule",
        "--model.backbone=moe_heads.lightning_modules.DigitsCNN",
        "--model.head.init_args.in_features=64",
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    path = str(ROOT / "examples" / "configs" / config)
    monkeypatch.setattr("sys.argv", ["train.py"])
    cli = train.main(["fit", "--config", path, *overrides])
    analyses = [callback for callback in cli.trainer.callbacks if isinstance(callback, FitEndAnalysis)]
    assert [analysis.name for analysis in analyses] == [
        "sharpness",
        "loss_landscape",
        "expert_utilization",
        "inference_timing",
    ]
    assert all(analysis.results for analysis in analyses)
