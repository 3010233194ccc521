"""Clients of a gateway's HTTP API in a process of their own: `python -m benchmarks.http_clients < JSON`.

Reads one JSON object (see `replay_http`), sends each request at its time as a streamed completion, and writes a line
for each in order: `[refused, seconds to the first token, [seconds between tokens], seconds it was sent too late]`. Its
own process: so that clients and what they measure share no interpreter; their number is bounded, and so is their time.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from benchmarks.replay import Arrival, Seen

_MODULE = "benchmarks.http_clients"
_CONNECTIONS = 512


async def replay_http(
    url: str, model: str, arrivals: Sequence[Arrival], keys: Mapping[str, str], *, limit_s: float, nice: int = 0
) -> list[Seen]:
    """Let a process of clients send requests, each at its time from now on; returns what they saw.

    Args:
        url: of the gateway.
        model: its name there.
        arrivals: with the times at which to send.
        keys: API keys by tenant; empty: none is asked for.
        limit_s: what has not begun to come by then counts as refused.
        nice: of the process, 0 to 19: clients that stand for other machines' leave the cores to whoever serves.
    """
    given = {
        "url": url,
        "model": model,
        "limit_s": limit_s,
        "nice": nice,
        "requests": [[each.at_s, each.prompt, each.output, keys.get(each.tenant, "")] for each in arrivals],
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", _MODULE, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(json.dumps(given).encode()), limit_s + 60.0)
    finally:
        if process.returncode is None:
            process.kill()
    lines = [json.loads(line) for line in out.splitlines()]
    return [
        Seen(tenant=each.tenant, refused=refused, ttft_s=ttft_s, gaps_s=gaps, late_s=late_s)
        for each, (refused, ttft_s, gaps, late_s) in zip(arrivals, lines, strict=True)
    ]


async def _send(session: aiohttp.ClientSession, given: Mapping[str, Any], index: int, began: float, seen: Seen) -> None:
    at_s, prompt, output, key = given["requests"][index]
    await asyncio.sleep(max(at_s - (time.perf_counter() - began), 0.0))
    body = {
        "model": given["model"],
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    last = sent = time.perf_counter()
    seen.late_s = sent - began - at_s
    async with session.post(f"{given['url']}/v1/completions", json=body, headers=headers) as reply:
        if reply.status == 429:
            return
        reply.raise_for_status()
        async for line in reply.content:
            tokens = _tokens(line)
            now = time.perf_counter()
            if tokens and seen.refused:
                seen.refused, seen.ttft_s = False, now - sent
            elif tokens:
                seen.gaps_s += [(now - last) / tokens] * tokens
            last = now if tokens else last


def _tokens(line: bytes) -> int:
    """New tokens in a line of an event stream."""
    if not line.startswith(b"data: {"):
        return 0
    event = json.loads(line[6:])
    if "error" in event:
        raise RuntimeError(f"a stream ended with {event['error']}")
    return len(event["choices"][0].get("token_ids") or ()) if event["choices"] else 0


async def _run(given: Mapping[str, Any]) -> list[Seen]:
    seen = [Seen(tenant="", refused=True) for _ in given["requests"]]
    connector = aiohttp.TCPConnector(limit=_CONNECTIONS)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        began = time.perf_counter()
        tasks = [asyncio.create_task(_send(session, given, index, began, each)) for index, each in enumerate(seen)]
        done, late = await asyncio.wait(tasks, timeout=given["limit_s"])
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()
    return seen


def main() -> None:
    """Send what standard input says."""
    given = json.load(sys.stdin)
    os.nice(given["nice"])
    for each in asyncio.run(_run(given)):
        print(json.dumps([each.refused, each.ttft_s, each.gaps_s, each.late_s]))


if __name__ == "__main__":
    main()
