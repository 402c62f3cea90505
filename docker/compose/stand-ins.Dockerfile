# What compose.yaml takes from Docker Hub, from Debian's packages instead, for docker/test_compose.sh
# where Docker Hub is not to be had. Debian has no Grafana.
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-trixie
FROM ${PYTHON_IMAGE} AS packages
# hadolint ignore=DL3008
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        docker-compose prometheus redis-server >/dev/null \
    && rm -rf /var/lib/apt/lists/*

FROM packages AS redis
# As Docker Hub's: in a container others may connect.
ENTRYPOINT ["redis-server", "--bind", "*", "--protected-mode", "no"]

FROM packages AS prometheus
RUN install -d -o nobody -g nogroup /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
