"""The progress bar follows the Trainer's, appears after a delay, and is removed at the end."""

import importlib.util
import io
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from moe_heads.callbacks._shared import progress_bar
from tests.support.lightning_models import PlainModule, loader, trainer

TERMINAL = {"force_terminal": True, "width": 120, "color_system": None}


@pytest.fixture(autouse=True)
def _soon_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "_SECONDS_BEFORE_SHOWN", 0.01)
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_DRAWS", 0.01)


class Screen:
    """What standard output, where rich's console writes too, and standard error have got so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._written = capsys, ""

    def written(self) -> str:
        self._written += "".join(self._capsys.readouterr())
        return self._written

    def last_frame(self) -> str:
        """What the last drawing left: tqdm writes over a line from its beginning, rich erases it first."""
        return self.written().rpartition("\x1b[2K")[2].rpartition("\r")[2]

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 10
        while text not in self.written():
            assert time.monotonic() < end, f"{text!r} is not in {self._written[-1000:]!r}"
            time.sleep(0.005)


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str]) -> Iterator[Screen]:
    console = vars(rich.get_console())
    rich.reconfigure(**TERMINAL)
    yield Screen(capsys)
    rich.get_console().__dict__ = console


def trainer_with(bar: ProgressBar) -> Trainer:
    return trainer(bar, enable_progress_bar=True)


STYLES = pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar, ProgressBar])


@STYLES
def test_steps_and_quantities(bar: type[ProgressBar] | None, screen: Screen) -> None:
    with progress_bar.progress_bar(bar and trainer_with(bar()), "router[a]") as show:
        show(3, 12, {"residual": 0.021349, "trace": 123456.0})
        screen.wait_for(" 3/12")
        screen.wait_for("residual=0.0213, trace=1.23e+05")
        show(4, 13, {})  # a new total
        screen.wait_for(" 4/13")
        show(1, 13, {})  # a new phase
        screen.wait_for(" 1/13")
        show(5, None, {})
        screen.wait_for(" 5/?")
        show(6, 7, {})
        screen.wait_for(" 6/7")
        assert "router[a]" in screen.written()
    assert "router[a]" not in screen.last_frame()


@STYLES
def test_appears_before_the_first_step_is_done(bar: type[ProgressBar] | None, screen: Screen) -> None:
    with progress_bar.progress_bar(bar and trainer_with(bar()), "sharpness"):
        screen.wait_for("0/?")


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_elapsed_time_goes_on_during_a_step(bar: Any, screen: Screen) -> None:
    with progress_bar.progress_bar(trainer_with(bar()), "sharpness") as show:
        show(2, 2, {})
        screen.wait_for("2/2")
        show(1, 2, {})  # a new phase
        screen.wait_for("0:01")


@STYLES
def test_a_short_block_prints_nothing(
    bar: type[ProgressBar] | None, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_bar, "_SECONDS_BEFORE_SHOWN", 60.0)
    begun = time.monotonic()
    with progress_bar.progress_bar(bar and trainer_with(bar()), "sharpness") as show:
        show(1, 2, {})
        time.sleep(0.05)
    assert screen.written() == ""
    assert time.monotonic() - begun < 30  # leaving does not wait for the bar


def test_without_trainer_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar.progress_bar(None, "sharpness"):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert (out, "sharpness" in err) == ("", True)


def disabled(bar: Any) -> Trainer:
    bar.disable()
    return trainer_with(bar)


@pytest.mark.parametrize(
    "make_trainer",
    [
        trainer,
        lambda: trainer_with(TQDMProgressBar(refresh_rate=0)),
        lambda: disabled(TQDMProgressBar()),
        lambda: disabled(RichProgressBar()),
        lambda: Trainer(accelerator="cpu", barebones=True),
    ],
    ids=["no bar", "refresh rate 0", "tqdm disabled", "rich disabled", "barebones"],
)
def test_silent_where_the_trainer_is(make_trainer: Any, screen: Screen) -> None:
    quiet = make_trainer()
    with progress_bar.progress_bar(quiet, "sharpness") as show:
        show(3, 12, {"residual": 0.1})
        time.sleep(0.1)
    assert "sharpness" not in screen.written()


def test_silent_on_other_ranks(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    with progress_bar.progress_bar(trainer_with(TQDMProgressBar()), "sharpness"):
        time.sleep(0.1)
    assert screen.written() == ""


@STYLES
def test_goes_when_the_block_fails(bar: type[ProgressBar] | None, screen: Screen) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        progress_bar.progress_bar(bar and trainer_with(bar()), "sharpness") as show,
    ):
        show(3, 12, {})
        screen.wait_for("3/12")
        raise KeyboardInterrupt
    assert "sharpness" not in screen.last_frame()


def test_a_bar_that_cannot_be_drawn_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("broken pipe")

    monkeypatch.setattr(sys, "stderr", Broken())
    done = []
    with (
        pytest.warns(UserWarning, match="sharpness: the progress bar failed with OSError: broken pipe"),
        progress_bar.progress_bar(None, "sharpness") as show,
    ):
        time.sleep(0.1)
        show(1, 2, {})
        done.append(1)
    assert done == [1]
    locks = Tqdm.get_lock().locks
    assert [lock.acquire(False) for lock in locks] == [True] * len(locks)  # else the Trainer's bars wait for ever
    for lock in locks:
        lock.release()


def test_needs_no_rich(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    spec = importlib.util.find_spec(progress_bar.__name__)
    assert spec is not None and spec.loader is not None
    without_rich = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without_rich)
    without_rich._SECONDS_BEFORE_SHOWN = 0.01
    with without_rich.progress_bar(trainer_with(TQDMProgressBar()), "sharpness"):
        screen.wait_for("sharpness")


class InAllHooks(Callback):
    """Shows progress in the hooks in which an analysis may run, while the Trainer's own bar is on the screen or not."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen = screen
        self.left: list[str] = []

    def analyze(self, trainer: Trainer, hook: str) -> None:
        with progress_bar.progress_bar(trainer, f"analysis in {hook} of {trainer.current_epoch}") as show:
            show(3, 12, {"residual": 0.0213})
            self.screen.wait_for(f"analysis in {hook} of {trainer.current_epoch}")
        self.left.append(self.screen.last_frame())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.analyze(trainer, "on_train_epoch_end")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.analyze(trainer, "on_validation_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.analyze(trainer, "on_fit_end")


@pytest.mark.parametrize("last", [False, True], ids=["before the bar's own hooks", "after them"])
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_bar_next_to_the_trainers_own_bar(bar: Any, last: bool, screen: Screen) -> None:
    options = {"console_kwargs": TERMINAL} if bar is RichProgressBar else {}
    own, analyses = bar(**options), InAllHooks(screen)
    fit = trainer(*([own, analyses] if last else [analyses, own]), enable_progress_bar=True, max_epochs=2)
    fit.fit(PlainModule(), val_dataloaders=loader())
    assert len(analyses.left) == 5
    assert not any("analysis" in frame for frame in analyses.left)
    first, second = screen.written().split("analysis in on_train_epoch_end of 0", 1)
    assert "Epoch 0" in first
    assert "Epoch 1" in second
    if bar is RichProgressBar:
        assert "Epoch 0" in analyses.left[0]
        assert "Epoch 1" in analyses.left[-1]
        # in one display: the Trainer's line comes right above
        line = second.split("\n")[second.split("analysis in on_fit_end")[0].count("\n") - 1]
        assert "Epoch 1" in line
        assert not cast("Any", own.progress).live.is_started
        assert "get_renderables" not in vars(own.progress)
