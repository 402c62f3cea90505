"""Helm's own engine on a chart, in an environment that has it; prints JSON.

    python helm_chart.py lint CHART
    python helm_chart.py package CHART FOLDER
    python helm_chart.py install CHART VALUES       every object that Helm sends to a cluster

The library has no `helm template`. `install` therefore talks to a cluster that is a small HTTP
server here: it knows which kinds there are, has no object, and writes down what it is sent.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

RELEASE, NAMESPACE = "node", "kv"
GROUPS = {
    "v1": {"configmaps": "ConfigMap", "secrets": "Secret", "serviceaccounts": "ServiceAccount",
           "services": "Service", "namespaces": "Namespace"},
    "apps/v1": {"daemonsets": "DaemonSet", "deployments": "Deployment"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "monitoring.coreos.com/v1": {"podmonitors": "PodMonitor"},
}  # fmt: skip


class Cluster(BaseHTTPRequestHandler):
    """As much of the API as an installation asks for."""

    objects: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        groups = [group for group in GROUPS if "/" in group]
        if path == "version":
            self.answer(200, {"major": "1", "minor": "33", "gitVersion": "v1.33.0"})
        elif path == "api":
            self.answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "apis":
            self.answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": group.partition("/")[0],
                 "versions": [{"groupVersion": group, "version": "v1"}],
                 "preferredVersion": {"groupVersion": group, "version": "v1"}}
                for group in groups
            ]})  # fmt: skip
        elif (group := re.sub("^apis?/", "", path)) in GROUPS:
            self.answer(200, {
                "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group,
                "resources": [
                    {"name": name, "kind": kind, "namespaced": kind != "Namespace",
                     "singularName": "", "verbs": ["create", "get", "list", "patch"]}
                    for name, kind in GROUPS[group].items()
                ],
            })  # fmt: skip
        elif path.endswith("/secrets"):
            self.answer(200, {"kind": "SecretList", "apiVersion": "v1", "items": []})
        else:
            self.answer(404, {"kind": "Status", "status": "Failure", "reason": "NotFound",
                              "code": 404})  # fmt: skip

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.headers["Content-Type"]
        # Helm's record of the release, a Secret, comes as protobuf; the chart's objects are JSON.
        if kind == "application/json":
            self.objects.append(json.loads(body))
        self.answer(201, body, kind)

    do_PUT = do_POST  # noqa: N815 - the name is the interface

    def answer(
        self, status: int, body: dict[str, Any] | bytes, kind: str = "application/json"
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """To stdout goes JSON only."""


def install(chart: str, values: dict[str, Any]) -> object:
    from helm_sdkpy import Configuration, Install

    server = ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    access = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {
            "server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(access, file)
        file.flush()
        configuration = Configuration(namespace=NAMESPACE, kubeconfig=file.name)
        asyncio.run(Install(configuration).run(RELEASE, chart, values, wait=False, timeout=20))
    return Cluster.objects


def main(task: str, chart: str, argument: str = "") -> None:
    from helm_sdkpy import Configuration, Lint, Package

    if task == "install":
        result: object = install(chart, json.loads(argument))
    elif task == "lint":
        result = asyncio.run(Lint(Configuration()).run(chart))
    else:
        result = asyncio.run(Package(Configuration()).run(chart, argument))
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
