"""Ctrl-C is delayed and not lost."""

import os
import signal
import threading
import time

import pytest
import torch

from moe_heads.analysis._shared import state
from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.state import preserved


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def test_ctrl_c_comes_at_the_end_of_the_block() -> None:
    handler = signal.getsignal(signal.SIGINT)
    finished = False
    with pytest.raises(KeyboardInterrupt), HeldInterrupts() as interrupts:
        press_ctrl_c()
        assert interrupts.pending
        finished = True
    assert finished
    assert signal.getsignal(signal.SIGINT) is handler


def test_check_raises_a_delayed_interrupt_once() -> None:
    with HeldInterrupts() as interrupts:
        press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()


def test_blocks_of_one_object_nest() -> None:
    interrupts = HeldInterrupts()
    with pytest.raises(KeyboardInterrupt), interrupts:
        with interrupts:
            press_ctrl_c()
        assert interrupts.pending


def test_ctrl_c_that_is_ignored_stays_ignored_and_a_handler_of_the_users_is_called() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    called: list[int] = []
    try:
        with HeldInterrupts():
            press_ctrl_c()
        signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
        with HeldInterrupts():
            press_ctrl_c()
            assert called == []
        assert called == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)


def test_an_error_of_the_block_passes() -> None:
    with pytest.raises(ZeroDivisionError), HeldInterrupts():
        press_ctrl_c()
        raise ZeroDivisionError


def test_other_threads_have_no_signals_to_hold() -> None:
    def work() -> None:
        with HeldInterrupts():
            done.append(1)

    done: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_ctrl_c_while_a_model_is_put_back_does_not_leave_it_half_done(monkeypatch: pytest.MonkeyPatch) -> None:

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = [p.detach().clone() for p in model.parameters()]
    write_back = state.write_back
    calls: list[int] = []

    def interrupted(tensor: torch.Tensor, values: torch.Tensor) -> None:
        write_back(tensor, values)
        calls.append(1)
        if len(calls) == 2:
            press_ctrl_c()

    monkeypatch.setattr(state, "write_back", interrupted)
    with pytest.raises(KeyboardInterrupt), preserved(model):
        for parameter in model.parameters():
            parameter.data.zero_()
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
