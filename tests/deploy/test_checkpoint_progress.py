import io
import logging

import pytest

from deploy.checkpoint_progress import LoadProgress


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_person_at_a_terminal_sees_a_bar_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), FakeClock()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with LoadProgress("weights", stream=stream, clock=clock) as progress:
        clock.now += 2
        progress(4_000_000_000, 8_000_000_000)
        progress(8_000_000_000, 8_000_000_000)
    assert "weights" in stream.getvalue()
    assert "GB/s" in stream.getvalue()


def test_log_has_a_line_at_most_every_five_seconds_and_a_last_one(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    with caplog.at_level(logging.INFO), LoadProgress("weights", stream=io.StringIO(), clock=clock) as progress:
        for second in range(12):
            clock.now = 100.0 + second
            progress(second * 1_000_000_000, 12_000_000_000)
    assert caplog.messages == [
        "weights: 5.00 GB read, 42%, 1.00 GB/s",
        "weights: 10.00 GB read, 83%, 1.00 GB/s",
        "weights: read 11.000 GB in 11.0 s, 1.00 GB/s",
    ]


def test_failed_load_does_not_claim_to_be_done(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with LoadProgress("weights", stream=io.StringIO()):
            raise ValueError("broken")

    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="broken"):
        fail()
    assert caplog.messages == []
