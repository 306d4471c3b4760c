# The model store: stages weights in memory that it shares with the engines of its machine.
# Context: the repository's root. BuildKit; the base is any Debian-based image with python3 (3.11 or newer) and venv.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY deploy/compose/install.sh deploy/compose/
COPY requirements/images/build.lock requirements/images/model_store.lock requirements/images/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle.pem \
    deploy/compose/install.sh packages requirements/images/model_store.lock
COPY libs/common libs/common
COPY services/model_store services/model_store
RUN deploy/compose/install.sh parts libs/common services/model_store

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="prism-model_store" \
      org.opencontainers.image.description="Staged weights of one machine" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --user-group --create-home --home-dir /home/prism prism \
    && install -d -o prism -g prism /run/prism /models /var/lib/prism/images /var/lib/prism/hub
COPY --from=build /opt/prism /opt/prism
ENV PATH=/opt/prism/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/var/lib/prism/hub
USER prism
VOLUME ["/run/prism", "/var/lib/prism/images", "/var/lib/prism/hub"]
ENTRYPOINT ["python", "-m", "prism.model_store"]
