"""The gateway's Prometheus metrics, in a registry of their own.

Names and meanings follow the ones that dashboards and inference gateways read from other servers, with our prefix.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.journey import Moment
from cluster.journey import RequestTrace as JourneyTrace
from deploy.trace import RequestTrace
from router.load import MemberLoad

Api = Literal["http", "grpc"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_STAGES: Final[tuple[tuple[str, Moment, Moment], ...]] = (
    ("gateway", "received_s", "submitted_s"),
    ("prefill", "submitted_s", "first_token_s"),
    ("handoff", "handoff_start_s", "first_decode_s"),
    ("decode", "first_decode_s", "done_s"),
)
_MEMBER_COUNTS: Final = {
    "preemptions": "Running requests that gave up their room since the start, by member.",
    "drafted_tokens": "Drafts verified since the start, by member.",
    "accepted_tokens": "Drafts that were right since the start, by member.",
    "pulls": "Hand-offs pulled since the start, by member.",
    "failed_pulls": "Hand-offs that failed since the start, their tokens computed anew, by member.",
    "refetched_frames": "Damaged frames of hand-offs that were asked for again since the start, by member.",
    "pulled_bytes": "Bytes of hand-offs whose pulls succeeded since the start, by member.",
    "pull_s": "Seconds that pulls which succeeded took since the start, by member.",
}
_PRIORITIES: Final = {1: "positive", 0: "none", -1: "negative"}
_TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_E2E_BUCKETS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)


class GatewayMetrics:
    """Everything one gateway process counts; all series carry `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._build_histograms()
        self._build_counters()
        self._build_gauges()
        # Looked up once: these two are told of every token.
        self._one_token = self._generation_tokens.labels(model_name)
        self._one_gap = self._itl.labels(model_name)

    def _build_histograms(self) -> None:
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", _TTFT_BUCKETS_S
        )
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of one choice.", _ITL_BUCKETS_S)
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last token.", _E2E_BUCKETS_S
        )
        self._tokenize = self._histogram(
            "request_tokenize_time_seconds", "Validation, chat template and encoding.", _ITL_BUCKETS_S
        )
        self._stage = self._histogram(
            "request_stage_seconds",
            "Where a request's time goes: gateway (until sent to its first member), prefill (until its first token), "
            "handoff (from first token to the decode member's first), decode (from there to the last).",
            _ITL_BUCKETS_S,
            "stage",
        )
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self._output_size = self._histogram("request_generation_tokens", "Tokens made for a choice.", _TOKEN_BUCKETS)

    def _build_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens received from the back end.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._success = self._counter("request_success", "Choices that ended well, by reason.", "finished_reason")
        self._errors = self._counter("request_errors", "Requests refused or failed, by code.", "api", "code")
        self._aborts = self._counter("request_aborts", "Requests whose client left before the end.")

    def _build_gauges(self) -> None:
        self._in_flight = self._gauge("num_requests_in_flight", "Requests that this gateway is serving.")
        self._queued = self._gauge(
            "num_requests_queued", "Requests waiting at this gateway for their turn, by sign of priority.", "priority"
        )
        member = ("member_id", "role")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting for a row, by member.", *member)
        self._running = self._gauge("num_requests_running", "Requests in the running batch, by member.", *member)
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1, by member.", *member)
        self._state_usage = self._gauge(
            "state_cache_usage_perc", "Share of recurrent-state slots in use, 0 to 1, by member.", *member
        )
        self._checkpoints = self._gauge(
            "state_checkpoints", "Recurrent states kept for later prompts, by member.", *member
        )
        self._checkpoint_bytes = self._gauge(
            "state_checkpoint_bytes", "Memory of the recurrent states kept for later prompts, by member.", *member
        )
        self._evicted_checkpoints = self._gauge(
            "state_checkpoints_evicted", "Kept recurrent states given up for room since the start, by member.", *member
        )
        self._counts = {name: self._gauge(name, text, *member) for name, text in _MEMBER_COUNTS.items()}
        self._cache_config = self._gauge(
            "cache_config_info", "1; the labels tell the KV cache's geometry.", *member, "block_size", "num_gpu_blocks"
        )

    def request_started(self, num_prompt_tokens: int) -> None:
        """A validated request goes to the back end."""
        self._in_flight.labels(self._model).inc()
        self._prompt_tokens.labels(self._model).inc(num_prompt_tokens)
        self._prompt_size.labels(self._model).observe(num_prompt_tokens)

    def token(self, gap_s: float | None) -> None:
        """A token arrived, `gap_s` after the one before of the same choice."""
        self._one_token.inc()
        if gap_s is not None:
            self._one_gap.observe(gap_s)

    def prefix_lookup(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A member told how much of a prompt it had cached."""
        self._prefix_queries.labels(self._model).inc(num_prompt_tokens)
        self._prefix_hits.labels(self._model).inc(num_cached_tokens)

    def choice_finished(self, reason: Literal["stop", "length"], num_tokens: int) -> None:
        """One choice ended well."""
        self._success.labels(self._model, reason).inc()
        self._output_size.labels(self._model).observe(num_tokens)

    def request_ended(self, trace: RequestTrace, *, complete: bool) -> None:
        """The request left the gateway; `complete` if every choice ended well."""
        self._in_flight.labels(self._model).dec()
        moments = [(self._tokenize, trace.tokenized_s), (self._ttft, trace.first_token_s)]
        if complete:
            moments.append((self._e2e, trace.last_token_s))
        for histogram, moment_s in moments:
            after = trace.after_received(moment_s)
            if after is not None:
                histogram.labels(self._model).observe(after)

    def stages(self, trace: JourneyTrace) -> None:
        """The dispatcher's times of one request."""
        for stage, start, end in _STAGES:
            seconds = trace.between(start, end)
            if seconds is not None:
                self._stage.labels(self._model, stage).observe(seconds)

    def client_left(self) -> None:
        """A client closed its connection before the reply was complete."""
        self._aborts.labels(self._model).inc()

    def error(self, api: Api, code: str) -> None:
        """A request was refused or failed."""
        self._errors.labels(self._model, api, code).inc()

    def render(self, loads: Iterable[MemberLoad], waiting: Mapping[int, int]) -> bytes:
        """The text for a scrape, with the members' latest loads and the queue by priority class (1, 0 and -1)."""
        for priority_class, count in waiting.items():
            self._queued.labels(self._model, _PRIORITIES[priority_class]).set(count)
        checkpoints = (self._checkpoints, self._checkpoint_bytes, self._evicted_checkpoints)
        gauges = (self._waiting, self._running, self._kv_usage, self._state_usage, self._cache_config)
        for gauge in (*gauges, *checkpoints, *self._counts.values()):
            gauge.clear()
        for load in loads:
            labels = (self._model, str(load.member_id), load.role)
            self._waiting.labels(*labels).set(load.waiting_requests)
            self._running.labels(*labels).set(load.running_requests)
            self._kv_usage.labels(*labels).set(_used_share(load.free_blocks, load.total_blocks))
            self._state_usage.labels(*labels).set(_used_share(load.free_state_slots, load.total_state_slots))
            if load.total_state_slots:
                self._checkpoints.labels(*labels).set(load.state_checkpoints)
                self._checkpoint_bytes.labels(*labels).set(load.state_checkpoints * load.checkpoint_bytes)
                self._evicted_checkpoints.labels(*labels).set(load.evicted_checkpoints)
            for name, gauge in self._counts.items():
                gauge.labels(*labels).set(getattr(load.counts, name))
            self._cache_config.labels(*labels, str(load.block_size), str(load.total_blocks)).set(1)
        return generate_latest(self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        names = ["model_name", *labels]
        return Histogram(f"moefleet:{name}", help_text, names, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"moefleet:{name}", help_text, ["model_name", *labels], registry=self.registry)

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"moefleet:{name}", help_text, ["model_name", *labels], registry=self.registry)


def _used_share(free: int, total: int) -> float:
    return 0.0 if total == 0 else 1.0 - free / total
