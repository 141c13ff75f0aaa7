# An engine on CPUs, for demos: vLLM's CPU build with the plugin, and a tiny model with skewed routing. Build from the root:
#   docker build --file deploy/engine-cpu.Dockerfile --tag llep-engine-cpu .
# Where pip does not find torch's CPU build: --build-arg PIP_EXTRA_INDEX_URL=..., the index of PyTorch's CPU wheels.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL}
WORKDIR /src
COPY requirements.lock ./
RUN python3 -m venv /opt/llep && /opt/llep/bin/pip install --no-cache-dir --no-deps --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY llep llep
COPY server server
COPY k8s k8s
RUN /opt/llep/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /opt/llep/bin/llep model tiny gpt-oss /models/tiny-gpt-oss \
       --hot 0-7 --hot-share 0.85 --hidden 256 --intermediate 1024 --dtype bfloat16

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="llep engine, on CPUs" \
      org.opencontainers.image.description="vLLM for CPUs with least-loaded expert parallelism, for demos" \
      org.opencontainers.image.licenses="Apache-2.0"
# vLLM compiles for the processor that it finds. Debian's own versions are what the base's tag says.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 llep && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home llep \
    && install --directory --owner=10001 --group=10001 /run/llep
COPY --from=build /opt/llep /opt/llep
COPY --from=build /models /models
# The path of a secret is none.
# hadolint ignore=DL3064
ENV PATH=/opt/llep/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    LLEP_STATE_DIR=/var/lib/llep \
    LLEP_RECORD_DIR=/tmp/llep-recordings \
    RAY_AUTH_TOKEN_PATH=/run/llep/ray-token \
    VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_CPU_OMP_THREADS_BIND=0|1
USER 10001:10001
VOLUME ["/run/llep"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["llep", "with-ray", "node", "python3", "-m", "vllm.entrypoints.openai.api_server"]
CMD ["--model", "/models/tiny-gpt-oss", "--served-model-name", "tiny-gpt-oss", "--dtype", "float32", "--enforce-eager", "--tensor-parallel-size", "2", "--enable-expert-parallel"]
