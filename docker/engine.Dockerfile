# SGLang with kvcodec as a plugin: no file of SGLang is patched.
#
#   docker build -f docker/engine.Dockerfile -t sglang-kvcodec .
#
# kvcodec is compiled here, against the C library of SGLang's image.
ARG SGLANG_IMAGE=docker.io/lmsysorg/sglang:v0.5.23
ARG KVCODEC_WHEELS=/tmp/wheels

FROM ${SGLANG_IMAGE} AS build
ARG KVCODEC_WHEELS
# hadolint ignore=DL3008
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        g++ libxxhash-dev >/dev/null \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY LICENSE NOTICE README.md pyproject.toml ./
COPY kvcodec kvcodec
COPY proto proto
COPY backends backends
COPY server server
RUN python3 -m pip wheel -q --no-cache-dir --no-deps -w "$KVCODEC_WHEELS" .

FROM ${SGLANG_IMAGE}
ARG KVCODEC_WHEELS
COPY --from=build ${KVCODEC_WHEELS} ${KVCODEC_WHEELS}
# What SGLang has installed already stays as it is.
RUN python3 -m pip install -q --no-cache-dir --break-system-packages \
        "$(echo "$KVCODEC_WHEELS"/kvcodec-*.whl)[sidecar]" \
    && rm -r "$KVCODEC_WHEELS" \
    && kvcodec doctor --help >/dev/null
