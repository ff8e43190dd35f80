"""What a stage shows of itself, on a terminal and in a log."""

from __future__ import annotations

import io
import threading

import pytest

from fac_ray import progress as progress_module
from fac_ray.progress import Progress, format_rate, format_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_one_line_every_few_seconds_and_a_closing_line(clock):
    log = io.StringIO()
    with Progress("activations/anchor", total=1000, stream=log) as progress:
        for _ in range(12):
            clock[0] += 1.0
            progress.advance(50)
    assert log.getvalue().splitlines() == [
        "activations/anchor: 250 of 1,000 samples, 50.0/s, 15 s left",
        "activations/anchor: 500 of 1,000 samples, 50.0/s, 10 s left",
        "activations/anchor: done, 600 samples in 12 s, 50.0/s",
    ]


def test_a_count_that_stands_still_fills_no_log(clock):
    log = io.StringIO()
    with Progress("activations/anchor", total=10, stream=log) as progress:
        for _ in range(70):
            clock[0] += 1.0
            progress.set(0)
        assert log.getvalue().splitlines() == ["activations/anchor: 0 of 10 samples, 0.00/s"] * 2


def test_a_log_has_no_control_characters(clock):
    log = io.StringIO()
    with Progress("ingest", stream=log) as progress:
        clock[0] += 6.0
        progress.advance(3)
    assert "\r" not in log.getvalue()
    assert "\x1b" not in log.getvalue()


def test_a_terminal_has_one_line_that_is_rewritten(clock):
    terminal = Terminal()
    with Progress("ingest", total=4, unit="rows", stream=terminal) as progress:
        clock[0] += 2.0
        progress.set(1)
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.split("\r\x1b[2K") == [
        "",
        "ingest: 0 of 4 rows, 0.00/s",
        "ingest: 1 of 4 rows, 0.50/s, 6.0 s left",
        "ingest: done, 1 rows in 2.0 s, 0.50/s\n",
    ]


def test_an_interrupted_stage_does_not_say_done(clock):
    log = io.StringIO()

    def interrupted():
        with Progress("synthesis", stream=log) as progress:
            clock[0] += 1.0
            progress.advance(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert log.getvalue() == "synthesis: stopped at 2 samples in 1.0 s, 2.0/s\n"


def test_silent_shows_nothing_and_still_counts(capsys):
    with Progress.silent() as progress:
        progress.advance(5)
        progress.advance()
    assert progress.count == 6
    assert capsys.readouterr() == ("", "")


def test_no_advance_of_any_thread_is_lost():
    progress = Progress.silent()

    def work():
        for _ in range(2000):
            progress.advance(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.count == 16_000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (42, "42 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(0.417, "0.42/s"), (7.26, "7.3/s"), (1204.4, "1,204/s")])
def test_rates_keep_the_digits_that_matter(rate, text):
    assert format_rate(rate) == text
