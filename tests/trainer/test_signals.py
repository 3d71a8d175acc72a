"""What asks a run to stop, sent to this very process."""

import os
import signal
import threading
import time

import pytest

from trainer import signals
from trainer.errors import StopRequested
from trainer.signals import StopSignal, hold_stop_signals, stop_signals

NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"]


def send(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def ended(monkeypatch):
    """Exit statuses that the process would have ended with."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_heard_and_gets_its_word(name, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignal("saving, then leaving") as stop:
        assert not stop.requested
        send(number)
        assert (stop.requested, stop.name) == (True, name)
        said = ""

        def told():
            nonlocal said
            said += capfd.readouterr().err
            return said

        wait_for(told)
    assert said.startswith(f"{name} received: saving, then leaving")
    assert ("Ctrl-C again" in said) == (name == "SIGINT")
    assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == -1
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_one_process_of_several_speaks(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignal() as stop:
        send(signal.SIGTERM)
    assert stop.requested and capfd.readouterr().err == ""


def test_a_request_waits_for_who_listens():
    hold_stop_signals()
    send(signal.SIGTERM)  # else the end of this process
    with StopSignal() as stop:
        wait_for(lambda: stop.requested)


def test_under_nohup_a_closed_terminal_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with StopSignal() as stop:
            send(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals()


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch, ended, capfd):
    monkeypatch.setattr(signals, "_SAME_CTRL_C", 0.0)
    with StopSignal():
        send(signal.SIGINT)
        time.sleep(0.02)
        send(signal.SIGINT)
        wait_for(lambda: ended)
    assert ended == [130] and "left at once" in capfd.readouterr().err


def test_a_ctrl_c_that_a_launcher_passes_on_is_the_same_one(ended):
    with StopSignal() as stop:
        send(signal.SIGINT, times=3)
    assert stop.requested and not ended


def test_a_second_sigterm_is_only_asked_for_again(monkeypatch, ended):
    monkeypatch.setattr(signals, "_SAME_CTRL_C", 0.0)
    with StopSignal() as stop:
        send(signal.SIGTERM, times=3)
    assert stop.requested and not ended


def test_with_nothing_to_save_a_request_leaves_where_it_stands():
    with StopSignal() as stop:
        with pytest.raises(StopRequested), stop.at_once():
            send(signal.SIGTERM)
            raise AssertionError("not reached")
        with pytest.raises(StopRequested), stop.at_once():
            raise AssertionError("not reached either: it is asked for already")
        send(signal.SIGTERM)  # outside, it is a request again


def test_no_handler_for_failures_swallows_it():
    with StopSignal() as stop, pytest.raises(StopRequested), stop.at_once():
        try:
            send(signal.SIGTERM)
        except Exception:
            raise AssertionError from None


def test_on_another_thread_nothing_is_heard_and_nothing_fails():
    def work():
        with StopSignal() as stop:
            found.append(stop.requested)

    found: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
