# The worker and its engines: the one image with torch and SGLang. It also makes the tiny models.
# Context: the repository's root. BuildKit; the base is any Debian-based image with python3 (3.11 or newer) and venv.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY deploy/compose/install.sh deploy/compose/
COPY requirements/images/build.lock requirements/images/gpu_worker.lock requirements/images/
# For engines on NVIDIA GPUs: LOCK=requirements/gpu.lock and a base with nvcc (compose.gpu.yaml).
ARG LOCK=requirements/images/gpu_worker.lock
COPY requirements/gpu.lock requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle.pem \
    deploy/compose/install.sh packages "$LOCK"

FROM packages AS parts
COPY libs/common libs/common
COPY libs/scheduling libs/scheduling
COPY libs/cli libs/cli
COPY services/gpu_worker services/gpu_worker
RUN deploy/compose/install.sh parts libs/common libs/scheduling libs/cli services/gpu_worker

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="prism-gpu_worker" \
      org.opencontainers.image.description="Hosts the engines of one machine's GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --user-group --create-home --home-dir /home/prism prism \
    && install -d -o prism -g prism /run/prism /models /var/lib/prism/hub /home/prism/.cache
# Packages in a layer of their own, which stays the same when only Prism changes.
COPY --from=packages /opt/prism /opt/prism
COPY --from=parts /opt/parts /opt/prism
ENV PATH=/opt/prism/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HF_HOME=/var/lib/prism/hub
USER prism
ENTRYPOINT ["python", "-m", "prism.gpu_worker"]
