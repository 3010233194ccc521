"""Where one request's time goes: client-side TTFT and gaps, and the gateway's own stages, on a running server.

    python benchmarks/request_times.py --url http://127.0.0.1:8000 --requests 20 --prompt-tokens 128 --max-tokens 64

Requests go one after another to loopback. Stages are read from /metrics, as the mean over these requests.
"""

import argparse
import json
import random
import statistics
import time
from itertools import pairwise
from urllib.parse import urlsplit

import httpx

STAGES = ("gateway", "prefill", "handoff", "decode")


def stage_totals(client: httpx.Client) -> dict[str, tuple[float, float]]:
    """(seconds, requests) of each stage so far."""
    values: dict[str, float] = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("moefleet:request_stage_seconds_"):
            series, value = line.rsplit(" ", 1)
            values[series] = float(value)
    found = {}
    for stage in STAGES:
        sums = [v for k, v in values.items() if "_sum{" in k and f'stage="{stage}"' in k]
        counts = [v for k, v in values.items() if "_count{" in k and f'stage="{stage}"' in k]
        found[stage] = (sum(sums), sum(counts))
    return found


def one_request(client: httpx.Client, model: str, prompt: list[int], max_tokens: int) -> tuple[float, list[float]]:
    """TTFT and the gaps between later events, in seconds."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    begin = time.perf_counter()
    moments = []
    with client.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                moments.append(time.perf_counter())
    return moments[0] - begin, [after - before for before, after in pairwise(moments)]


def main() -> None:
    """Run and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    if urlsplit(options.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error(f"--url must be on loopback, got {options.url}")
    draw = random.Random(0)
    with httpx.Client(base_url=options.url, timeout=120) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        prompts = [[draw.randrange(100, 1000) for _ in range(options.prompt_tokens)] for _ in range(options.requests)]
        one_request(client, model, prompts[0], 4)
        before = stage_totals(client)
        results = [one_request(client, model, prompt, options.max_tokens) for prompt in prompts]
        after = stage_totals(client)
    gaps = [gap for _, each in results for gap in each]
    stages = {}
    for stage in STAGES:
        count = after[stage][1] - before[stage][1]
        if count:
            stages[f"{stage}_ms"] = round(1000 * (after[stage][0] - before[stage][0]) / count, 2)
    line = {
        "requests": options.requests,
        "ttft_ms_p50": round(1000 * statistics.median(ttft for ttft, _ in results), 2),
        "gap_ms_p50": round(1000 * statistics.median(gaps), 2),
        "gap_ms_p90": round(1000 * statistics.quantiles(gaps, n=10)[-1], 2),
        **stages,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
