#!/bin/sh
# Makes one image's environment in the builder stages of its Dockerfile.
#   install.sh packages LOCK     /opt/prism: exact versions, nothing resolved
#   install.sh parts FOLDER...   /opt/parts: this repository's own distributions, from their sources, to be laid
#                                over /opt/prism
# What a build host needs to reach its package index comes as BuildKit secrets (pip_config, ca_bundle),
# mounted for the step alone, so that no image holds any of it.
set -eu
if [ -s /run/secrets/ca_bundle.pem ]; then
    export PIP_CERT=/run/secrets/ca_bundle.pem
fi
# The services' processes may not write beside their code, and start faster with what is compiled here.
compile() {
    /opt/prism/bin/python -m compileall -q -j 0 -s "$1" -p /opt/prism "$1/lib" > /dev/null || true
}
verb=$1
shift
case "$verb" in
packages)
    python3 -m venv /opt/prism
    python3 -m venv /opt/build
    /opt/build/bin/pip install --quiet --no-deps -r requirements/images/build.lock
    /opt/prism/bin/pip install --quiet --no-deps --no-compile -r "$1"
    /opt/prism/bin/pip uninstall --quiet --yes pip
    compile /opt/prism
    ;;
parts)
    for part in "$@"; do
        /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --no-index -w /wheels "./$part"
    done
    /opt/build/bin/pip --python /opt/prism/bin/python install --quiet --no-deps --no-index --no-compile \
        --prefix /opt/parts /wheels/*.whl
    compile /opt/parts
    ;;
*)
    echo "install.sh: unknown step '$verb'; it is packages or parts" >&2
    exit 2
    ;;
esac
