# The control plane, with the Ray head and the scheduler beside it. Build from the repository's root:
#   docker build --file deploy/control-plane.Dockerfile --tag llep-control-plane .
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY llep llep
COPY server server
COPY k8s k8s
# The packages that it needs, at the versions that the tests ran with.
RUN python3 -m venv /opt/llep \
    && grep -E '^[A-Za-z0-9_.-]+==' requirements.lock | grep -v '+cpu$' > /tmp/pins \
    && /opt/llep/bin/pip install --no-cache-dir --constraint /tmp/pins '.[server,scheduler,planning,otel]'

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="llep control plane" \
      org.opencontainers.image.description="See and steer least-loaded expert parallelism" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 llep && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home llep \
    && install --directory --owner=10001 --group=10001 /var/lib/llep /run/llep
COPY --from=build /opt/llep /opt/llep
# The path of a secret is none.
# hadolint ignore=DL3064
ENV PATH=/opt/llep/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LLEP_STATE_DIR=/var/lib/llep \
    NUMBA_CACHE_DIR=/var/lib/llep/numba \
    LLEP_SERVER_HOST=0.0.0.0 \
    LLEP_SERVER_PORT=8088 \
    RAY_AUTH_TOKEN_PATH=/run/llep/ray-token
USER 10001:10001
VOLUME ["/var/lib/llep", "/run/llep"]
EXPOSE 8088 6379
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8088/livez', timeout=3)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["llep", "with-ray"]
CMD ["head", "llep", "control-plane"]
