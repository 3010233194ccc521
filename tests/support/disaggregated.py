"""Requests prefilled by one engine and decoded by another, both of this process."""

from collections.abc import Sequence
from dataclasses import replace

from router.request import Request, TokenEvent
from tests.support.exactness_matrix import Serving


def serve_apart(prefill: Serving, decode: Serving, requests: Sequence[Request]) -> list[list[TokenEvent]]:
    """Each request's first token from one engine, the rest from the other."""
    ids = [request.id for request in requests]
    for request in requests:
        prefill.engine.submit(request, mode="prefill")
    first, tickets = prefill.collect(ids)
    for request in requests:
        token = first[request.id][0].token_id
        assert token is not None
        decode.engine.submit_handoff(replace(request, output_ids=(token,)), tickets[request.id].ticket)
    rest, _ = decode.collect(ids)
    for ready in tickets.values():
        prefill.engine.release_ticket(ready.ticket.id)
    assert prefill.engine.drain(5)
    assert prefill.engine.load().free_blocks == prefill.engine.load().total_blocks
    return [[*first[request_id], *rest[request_id]] for request_id in ids]
