"""Admission is bounded, says when to come back, and never leaks a place."""

import pytest

from router.admission import Admission, AdmissionConfig
from router.errors import ConfigError, DeadlineExceededError, InvalidRequestError, OverloadedError
from router.request import Request, RequestId, SamplingParams


def make_request(number: int, deadline: float | None = None) -> Request:
    return Request(
        id=RequestId(f"r{number}"),
        prompt_ids=(1,),
        sampling=SamplingParams(max_tokens=1),
        deadline_unix_s=deadline,
    )


def refused_for(admission: Admission, number: int, now: float) -> float:
    with pytest.raises(OverloadedError) as caught:
        admission.admit(make_request(number), now)
    return caught.value.retry_after_s


def test_a_request_over_the_bound_is_refused_until_another_is_done() -> None:
    admission = Admission(AdmissionConfig(max_in_flight=2, max_queue=2))
    admission.admit(make_request(1), 0.0)
    admission.admit(make_request(2), 0.0)
    with pytest.raises(OverloadedError, match="max_in_flight=2"):
        admission.admit(make_request(3), 0.0)
    admission.done(RequestId("r1"), 1.0)
    admission.admit(make_request(3), 1.0)
    assert admission.num_in_flight == 2


def test_requests_without_a_first_token_are_bounded_apart() -> None:
    admission = Admission(AdmissionConfig(max_in_flight=9, max_queue=1))
    admission.admit(make_request(1), 0.0)
    with pytest.raises(OverloadedError, match="max_queue=1"):
        admission.admit(make_request(2), 0.0)
    admission.started(RequestId("r1"), 0.5)
    admission.admit(make_request(2), 0.5)
    assert (admission.num_in_flight, admission.num_queued) == (2, 1)


def test_all_places_are_free_when_all_are_done_however_often_that_is_said() -> None:
    admission = Admission()
    for number in range(10):
        admission.admit(make_request(number), 0.0)
    for number in [*range(10), *range(10), 77]:
        admission.started(RequestId(f"r{number}"), 1.0)
        admission.done(RequestId(f"r{number}"), 1.0)
    assert (admission.num_in_flight, admission.num_queued) == (0, 0)


def test_retry_after_follows_the_pace_of_completions_and_the_number_refused() -> None:
    admission = Admission(AdmissionConfig(max_in_flight=60, max_queue=60, min_retry_s=0.01, max_retry_s=50.0))
    for number in range(60):
        admission.admit(make_request(number), 0.0)
    for number in range(50):
        admission.done(RequestId(f"r{number}"), number * 0.1)
        admission.admit(make_request(100 + number), number * 0.1)
    first = refused_for(admission, 1000, 4.9)
    assert first == pytest.approx(0.1, rel=0.1)
    assert refused_for(admission, 1001, 4.9) == pytest.approx(2 * first)
    assert refused_for(admission, 1002, 8.9) == pytest.approx(3 * 4.0)
    assert refused_for(admission, 1003, 1000.0) == 50.0


def test_a_deadline_in_the_past_is_refused() -> None:
    admission = Admission()
    with pytest.raises(DeadlineExceededError, match=r"2\.000 s ago"):
        admission.admit(make_request(1, deadline=8.0), 10.0)
    admission.admit(make_request(1, deadline=10.5), 10.0)


def test_an_id_in_flight_is_refused() -> None:
    admission = Admission()
    admission.admit(make_request(1), 0.0)
    with pytest.raises(InvalidRequestError, match="r1 is in flight"):
        admission.admit(make_request(1), 0.0)


def test_bounds_that_cannot_work_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="max_queue must be at least 1, got 0"):
        AdmissionConfig(max_queue=0)
    with pytest.raises(ConfigError, match="min_retry_s"):
        AdmissionConfig(min_retry_s=2.0, max_retry_s=1.0)
