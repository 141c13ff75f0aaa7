# An engine on GPUs: vLLM's own image with the plugin in it. Build from the repository's root:
#   docker build --file deploy/engine.Dockerfile --tag llep-engine .
ARG BASE_IMAGE=vllm/vllm-openai:v0.32.0

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="llep engine" \
      org.opencontainers.image.description="vLLM with least-loaded expert parallelism" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY llep llep
COPY server server
COPY k8s k8s
# What the image has stays as it is: torch and vLLM above all.
RUN python3 -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==' > /tmp/pins \
    && python3 -m pip install --no-cache-dir --constraint /tmp/pins '.[scheduler,planning]' \
    && rm -r /src /tmp/pins \
    && groupadd --gid 10001 llep && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home llep \
    && install --directory --owner=10001 --group=10001 /models /run/llep
WORKDIR /models
# The path of a secret is none.
# hadolint ignore=DL3064
ENV HOME=/tmp \
    HF_HOME=/models \
    PYTHONUNBUFFERED=1 \
    LLEP_STATE_DIR=/var/lib/llep \
    LLEP_RECORD_DIR=/tmp/llep-recordings \
    RAY_AUTH_TOKEN_PATH=/run/llep/ray-token
USER 10001:10001
VOLUME ["/models", "/run/llep"]
EXPOSE 8000
# Weights take their time.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1800s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["llep", "with-ray", "node", "vllm", "serve"]
CMD ["--help"]
