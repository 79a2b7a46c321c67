"""Prometheus 的计数与直方图。"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """一个服务器的指标；登记在自己的表里，同一进程里建几个服务器也不打架。"""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common = {"registry": self.registry, "namespace": "minimind"}
        self.requests = Counter("requests", "请求数", ["endpoint", "status"], **common)
        self.prompt_tokens = Counter("prompt_tokens", "读入的提示词元", **common)
        self.prompt_computed = Counter("prompt_tokens_computed", "算过的提示词元", **common)
        self.prompt_reused = Counter("prompt_tokens_reused", "从前缀库抄来、没有重算的提示词元", **common)
        self.generated_tokens = Counter("generated_tokens", "写出的词元", **common)
        self.guessed_tokens = Counter("guessed_tokens", "写出的词元里先猜中的（推测解码）", **common)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "从收到请求到第一个词元", buckets=SECONDS, **common
        )
        self.per_token = Histogram(
            "time_per_output_token_seconds", "其后每个词元的平均用时", buckets=SECONDS, **common
        )
        self.duration = Histogram("request_seconds", "整个请求的用时", buckets=SECONDS, **common)
        self.in_flight = Gauge("samples_in_flight", "在写与排队的样本", **common)

    def render(self) -> bytes:
        return generate_latest(self.registry)
