#!/bin/sh
# Builds one image's environment, /opt/prism, in the builder stage of its Dockerfile.
#   install.sh packages LOCK     exact versions, nothing resolved
#   install.sh parts FOLDER...   this repository's own distributions, from their sources
# What a build host needs to reach its package index comes as BuildKit secrets (pip_config, ca_bundle),
# mounted for the step alone, so that no image holds any of it.
set -eu
if [ -s /run/secrets/ca_bundle.pem ]; then
    export PIP_CERT=/run/secrets/ca_bundle.pem
fi
verb=$1
shift
case "$verb" in
packages)
    python3 -m venv /opt/prism
    python3 -m venv /opt/build
    /opt/build/bin/pip install --quiet --no-deps -r requirements/images/build.lock
    /opt/prism/bin/pip install --quiet --no-deps -r "$1"
    ;;
parts)
    for part in "$@"; do
        /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --no-index -w /wheels "./$part"
    done
    /opt/prism/bin/pip install --quiet --no-deps --no-index /wheels/*.whl
    # The services' processes may not write beside their code, and start faster with what is compiled here.
    /opt/prism/bin/python -m compileall -q -j 0 /opt/prism/lib > /dev/null || true
    /opt/prism/bin/pip uninstall --quiet --yes pip
    ;;
*)
    echo "install.sh: unknown step '$verb'; it is packages or parts" >&2
    exit 2
    ;;
esac
