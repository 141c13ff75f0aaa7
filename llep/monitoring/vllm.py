"""How vLLM's own metrics are asked for: they carry one of three names, and people should not have to care."""


def vllm(name: str, select: str = "") -> str:
    """A selector of the metric vllm:`name`.

    prometheus_client writes the colon as an underscore where OpenMetrics is asked for, as Prometheus 2 does (its issue
    1177); Ray does so too and puts its own name before.
    """
    names = f'__name__=~"vllm:{name}|vllm_{name}|ray_vllm_{name}"'
    return f"{{{names}, {select}}}" if select else f"{{{names}}}"
