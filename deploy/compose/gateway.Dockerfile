# The gateway, and the `prism` command to look inside a running system.
# Context: the repository's root. BuildKit; the base is any Debian-based image with python3 (3.11 or newer) and venv.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY deploy/compose/install.sh deploy/compose/
COPY requirements/images/build.lock requirements/images/gateway.lock requirements/images/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle.pem \
    deploy/compose/install.sh packages requirements/images/gateway.lock
COPY libs/common libs/common
COPY libs/scheduling libs/scheduling
COPY libs/cli libs/cli
COPY services/gateway services/gateway
RUN deploy/compose/install.sh parts libs/common libs/scheduling libs/cli services/gateway

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="prism-gateway" \
      org.opencontainers.image.description="OpenAI-compatible HTTP in front of Prism's bus" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --user-group --create-home --home-dir /home/prism prism
COPY --from=build /opt/prism /opt/prism
ENV PATH=/opt/prism/bin:$PATH PYTHONUNBUFFERED=1
USER prism
EXPOSE 8000
ENTRYPOINT ["python", "-m", "prism.gateway"]
