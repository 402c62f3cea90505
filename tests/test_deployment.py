"""docker/: the image's ingredients, Compose, Kubernetes and Helm, as their own tools see them.

That the image works is not tried here but by docker/test_container.sh, which builds and runs it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
import yaml

from kvcodec.backend import open_backend, parse_byte_count
from kvcodec_server.config import Configuration
from kvcodec_server.sources import gathered

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
CHART = DOCKER / "helm" / "kvcodec"
STORES = Path(sys.prefix) / "stores"
TOOLS = STORES / "deployment" / "bin"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "engine.Dockerfile"]
STAND_INS = DOCKER / "compose" / "stand-ins.Dockerfile"
EXAMPLES = sorted((DOCKER / "kubernetes" / "examples").glob("*.yaml"))
# The oldest release that has containers which start before the others and live as long, and one
# of today.
KUBERNETES = ["1.29", "1.37"]
UID = 10001
SOCKET = "/run/kvcodec/kvcodec.sock"

Tree = dict[str, Any]


def run(*command: str | Path, cwd: Path = ROOT, environment: Tree | None = None) -> str:
    """What a command prints; the test fails with that if the exit code is not 0."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **(environment or {})},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name: str) -> str:
    """The path of a tool that tools/stores/deployment.sh installs, or that is on the PATH."""
    found = shutil.which(name, path=f"{TOOLS}:{STORES / 'promtool'}") or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: tools/install_stores.sh installs it, but for kubectl")
    return found


def documents(text: str) -> list[Tree]:
    return [document for document in yaml.safe_load_all(text) if document]


def files_of(configuration: Configuration) -> Tree:
    return {name: value for name, value, _ in configuration.rows()}


# --- the image


@pytest.mark.parametrize("dockerfile", [*DOCKERFILES, STAND_INS], ids=lambda path: path.name)
def test_dockerfile_has_no_finding_of_hadolint(dockerfile: Path):
    run(tool("hadolint"), dockerfile)


def copied(dockerfile: Path) -> Iterator[str]:
    for line in dockerfile.read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from"):
            yield from words[1:-1]


def allowed() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return {line[1:] for line in lines if line.startswith("!")}


def test_context_holds_what_is_copied_and_nothing_else():
    """.dockerignore is a list of what is sent; a file that no COPY names would be sent in vain."""
    wanted = {source for dockerfile in DOCKERFILES for source in copied(dockerfile)}
    assert wanted == allowed()
    assert all((ROOT / name).exists() for name in wanted)


def test_context_leaves_out_what_an_editable_install_built():
    """A CMake cache of this tree would end the build in the image."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    generated = {line.strip("/") for line in ignored if line.startswith("/kvcodec/native/")}
    lines = set((ROOT / ".dockerignore").read_text().splitlines())
    missing = {
        name for name in generated
        if name not in lines and not name.endswith(("install_manifest.txt", "/.ninja_deps",
                                                    "/.ninja_log", "/.ninja_lock"))
    }  # fmt: skip
    assert missing == set()
    assert {"**/*.so", "**/__pycache__", "kvcodec/native/.ninja_*"} <= lines


@pytest.mark.skipif(sys.version_info < (3, 11), reason="runs in the image, which has tomllib")
def test_requirements_are_those_of_the_extras_asked_for():
    script = DOCKER / "requirements.py"
    printed = run(sys.executable, script, ROOT / "pyproject.toml", "sidecar,redis").split("\n")
    assert any(line.startswith("grpcio>=") for line in printed)
    assert any(line.startswith("numpy>=") for line in printed)
    assert any(line.startswith("redis>=") for line in printed)
    assert not any("obstore" in line or "pytest" in line for line in printed)


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_script_is_sound_and_executable(script: Path):
    run("bash", "-n", script)
    assert os.access(script, os.X_OK)


class Answers(BaseHTTPRequestHandler):
    status = 200
    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_check_says_what_healthz_says(
    status: int, code: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Answers, "status", status)
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert health_check(f"0.0.0.0:{server.server_address[1]}") == code
    finally:
        server.shutdown()
        server.server_close()
    assert Answers.paths[-1] == "/healthz"
    assert health_check(f"0.0.0.0:{server.server_address[1]}") == 1


def health_check(address: str) -> int:
    command = [sys.executable, "-IS", str(DOCKER / "healthcheck.py")]
    environment = {"KVCODEC__HTTP__ADDRESS": address}
    return subprocess.run(command, env=environment, check=False, capture_output=True).returncode


def test_settings_of_the_image_hold_unless_a_variable_says_otherwise():
    """As a variable of the image, a setting would win against the file of a user."""
    assert not re.search(r"KVCODEC__(?!CONFIG\b)", DOCKERFILES[0].read_text())
    file = str(DOCKER / "kvcodec.yaml")
    store = {"KVCODEC__STORE__URL": "memory://"}
    assert files_of(gathered([], store, file))["http.address"] == "0.0.0.0:9464"
    assert files_of(gathered([], store, file))["listen.unix"] == SOCKET
    other = store | {"KVCODEC__HTTP__ADDRESS": "127.0.0.1:1234"}
    assert files_of(gathered([], other, file))["http.address"] == "127.0.0.1:1234"


# --- YAML and Compose

YAML_RULES = (
    "{extends: default, rules: {document-start: disable, line-length: {max: 120}, "
    "comments: {min-spaces-from-content: 1}}}"
)
COMPOSE = DOCKER / "compose.yaml"


def test_yaml_has_no_finding_of_yamllint():
    files = [COMPOSE, DOCKER / "kvcodec.yaml", *(DOCKER / "compose").glob("*.yaml")]
    files += [*(DOCKER / "kubernetes").rglob("*.yaml"), *CHART.glob("*.yaml")]
    run(tool("yamllint"), "--strict", "-d", YAML_RULES, *files)


@pytest.fixture(scope="module")
def services() -> Tree:
    found: Tree = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def test_compose_file_keeps_to_the_specification():
    files = [COMPOSE, STAND_INS.with_suffix(".yaml")]
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files)


def test_compose_contains_every_service_but_the_engine(services: Tree):
    """SGLang compiles kernels to its own file system."""
    for name, service in services.items():
        if name != "engine":
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name


def test_compose_publishes_ports_on_the_loopback_interface_only(services: Tree):
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_mounts_files_that_exist(services: Tree):
    volumes = [volume for service in services.values() for volume in service.get("volumes", [])]
    binds = [volume.partition(":")[0] for volume in volumes if volume.startswith(".")]
    assert binds
    assert [bind for bind in binds if not (DOCKER / bind).exists()] == []


def test_sidecar_of_compose_takes_its_settings(services: Tree):
    sidecar = services["sidecar"]
    configuration = gathered([], sidecar["environment"], str(DOCKER / "kvcodec.yaml"))
    shown = files_of(configuration)
    assert urlsplit(shown["store.url"]).hostname == "store"
    assert set(services["store"]["networks"]) & set(sidecar["networks"])
    assert_room(shown, f"{sidecar['mem_limit'][:-1]}Gi")
    assert float(sidecar["stop_grace_period"][:-1]) > shown["limits.drain_seconds"] + 5
    scraped = yaml.safe_load((DOCKER / "compose" / "prometheus.yaml").read_text())
    targets = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == [f"sidecar:{shown['http.address'].rpartition(':')[2]}"]


def test_prometheus_of_compose_reads_its_configuration():
    file = DOCKER / "compose" / "prometheus.yaml"
    run(tool("promtool"), "check", "config", "--syntax-only", file)
    (pattern,) = yaml.safe_load(file.read_text())["rule_files"]
    assert list((DOCKER / "prometheus").glob(Path(pattern).name)) == [
        DOCKER / "prometheus" / "kvcodec.rules.yaml"
    ]


def assert_room(settings: Tree, limit: str) -> None:
    """Memory for the RAM tier, staging, one region of an engine, and the process itself."""
    wanted = settings["store.ram_bytes"] + settings["limits.staging_bytes"] + (768 << 20)
    assert parse_byte_count("limit", f"{limit}B") >= wanted


def engine_flags(words: list[str]) -> dict[str, str]:
    return {flag: value for flag, _, value in (word.partition("=") for word in words)}


def assert_engine(words: list[str]) -> None:
    """An engine's command line uses kvcodec through the socket of the sidecar."""
    flags = engine_flags(words)
    assert flags["--hicache-storage-backend"] == "kvcodec"
    assert "--enable-hierarchical-cache" in flags
    options = json.loads(flags["--hicache-storage-backend-extra-config"])
    assert options == {"preset": "kv4", "url": f"sidecar+unix://{SOCKET}"}
    open_backend(options["url"]).close()


def test_engine_of_compose_uses_the_sidecar(services: Tree):
    assert_engine(services["engine"]["command"])
    assert "run:/run/kvcodec:ro" in services["engine"]["volumes"]
    assert "run:/run/kvcodec" in services["sidecar"]["volumes"]


# --- Kubernetes


@pytest.fixture(scope="module")
def base() -> list[Tree]:
    return documents(run(tool("kubectl"), "kustomize", DOCKER / "kubernetes"))


def of_kind(objects: list[Tree], kind: str) -> Tree:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def assert_valid(objects: list[Tree], folder: Path) -> None:
    file = folder / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    for version in KUBERNETES:
        run(tool("kubernetes-validate"), "--strict", "--quiet", "-k", version, file)


def test_kustomization_makes_valid_objects(base: list[Tree], tmp_path: Path):
    assert {each["kind"] for each in base} == {
        "Namespace", "ServiceAccount", "ConfigMap", "DaemonSet", "Service", "NetworkPolicy",
    }  # fmt: skip
    assert_valid(base, tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_valid(path: Path, tmp_path: Path):
    assert_valid(documents(path.read_text()), tmp_path)


def test_validation_finds_a_misspelt_field(base: list[Tree], tmp_path: Path):
    daemon_set = json.loads(json.dumps(of_kind(base, "DaemonSet")))
    daemon_set["spec"]["template"]["spec"]["hostNetwrk"] = True
    with pytest.raises(AssertionError, match="hostNetwrk"):
        assert_valid([daemon_set], tmp_path)


def unrestricted(pod: Tree, container: Tree) -> list[str]:
    """What the Pod Security Standard "restricted" says against a container."""
    mine, shared = container.get("securityContext", {}), pod.get("securityContext", {})
    both = shared | mine
    wrong = {
        "privilege escalation": mine.get("allowPrivilegeEscalation") is not False,
        "capabilities": mine.get("capabilities") != {"drop": ["ALL"]},
        "root": both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0,
        "seccomp": both.get("seccompProfile") != {"type": "RuntimeDefault"},
        "privileged": mine.get("privileged", False),
        "host ports": any("hostPort" in port for port in container.get("ports", [])),
        "host namespaces": any(pod.get(f"host{kind}") for kind in ("Network", "PID", "IPC")),
    }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def assert_sidecar(pod: Tree, config: str, folder: Path) -> None:
    """The container of the sidecar in a pod: what it may do, and that its settings fit the pod."""
    containers = [*pod["containers"], *pod.get("initContainers", [])]
    (sidecar,) = [each for each in containers if each["name"] == "kvcodec"]
    assert unrestricted(pod, sidecar) == []
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False

    assert sidecar["args"] == ["serve", "--config", "/etc/kvcodec/kvcodec.yaml"]
    file = folder / "kvcodec.yaml"
    file.write_text(config)
    settings = files_of(gathered([], {}, str(file)))
    assert settings["listen.unix"] == SOCKET
    assert settings["http.address"] == f"0.0.0.0:{sidecar['ports'][0]['containerPort']}"
    mounts = {mount["mountPath"] for mount in sidecar["volumeMounts"]}
    assert {"/etc/kvcodec", str(Path(SOCKET).parent)} <= mounts
    store = urlsplit(settings["store.url"])
    assert store.scheme != "file" or str(Path(store.path).parent) in mounts
    assert_room(settings, sidecar["resources"]["limits"]["memory"])
    assert pod["terminationGracePeriodSeconds"] > settings["limits.drain_seconds"] + 5
    for probe in ("livenessProbe", "startupProbe"):
        path = "/healthz" if probe == "livenessProbe" else "/readyz"
        assert sidecar[probe]["httpGet"]["path"] == path
        assert sidecar[probe]["httpGet"]["port"] == sidecar["ports"][0]["name"]


def test_daemon_set_is_restricted_and_fits_its_settings(base: list[Tree], tmp_path: Path):
    pod = of_kind(base, "DaemonSet")["spec"]["template"]["spec"]
    (config,) = of_kind(base, "ConfigMap")["data"].values()
    assert_sidecar(pod, config, tmp_path)


def test_folders_are_prepared_with_two_capabilities(base: list[Tree]):
    pod = of_kind(base, "DaemonSet")["spec"]["template"]["spec"]
    (folders,) = pod["initContainers"]
    assert unrestricted(pod, folders) == ["capabilities", "root"]
    assert folders["securityContext"]["capabilities"] == {
        "drop": ["ALL"], "add": ["CHOWN", "FOWNER"],
    }  # fmt: skip
    assert folders["command"][3:6:2] == [str(UID), str(UID)]


def test_service_and_policy_select_the_pods(base: list[Tree]):
    labels = of_kind(base, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        of_kind(base, "Service")["spec"]["selector"],
        of_kind(base, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        of_kind(base, "DaemonSet")["spec"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels.items()


def test_account_of_the_sidecar_has_no_token(base: list[Tree]):
    assert of_kind(base, "ServiceAccount")["automountServiceAccountToken"] is False
    assert not any("Role" in each["kind"] for each in base)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_engine_of_an_example_uses_the_sidecar(path: Path, tmp_path: Path):
    objects = documents(path.read_text())
    pod = of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    assert_engine(engine["args"])
    (mount,) = [each for each in engine["volumeMounts"] if each["mountPath"] == "/run/kvcodec"]
    assert mount["readOnly"] is True
    if "initContainers" not in pod:
        return
    assert unrestricted(pod, engine) == []
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert_sidecar(pod, of_kind(objects, "ConfigMap")["data"]["kvcodec.yaml"], tmp_path)
    budget = of_kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    assert (
        budget.items()
        <= of_kind(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    )


# --- Helm


def helm(*words: str | Path) -> Any:
    if not list(TOOLS.parent.glob("lib/python*/site-packages/helm_sdkpy")):
        pytest.skip("no Helm: tools/install_stores.sh installs it")
    return json.loads(run(TOOLS / "python", ROOT / "tests" / "helm_chart.py", *words))


def installed(values: Tree) -> list[Tree]:
    objects: list[Tree] = helm("install", CHART, json.dumps(values))
    for each in objects:
        each["metadata"].pop("annotations")
    return objects


@pytest.fixture(scope="module")
def release() -> list[Tree]:
    return installed({})


SECRETS = "/etc/kvcodec-secrets"
FULL: Tree = {
    "image": {"digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "config": {
        "store": {"url": "redis://store:6379/0", "ram_bytes": "1GiB"},
        "listen": {"tcp": ["0.0.0.0:9470"]},
        "tls": {"certificate": f"{SECRETS}/tls.crt", "key": f"{SECRETS}/tls.key"},
        "limits": {"drain_seconds": 60.5},
    },
    "environment": [{"name": "KVCODEC__LOG__LEVEL", "value": "debug"}],
    "environmentFrom": [{"secretRef": {"name": "store"}}],
    "secretFiles": "kvcodec-tls",
    "prepareFolders": False,
    "user": 1000700000,
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "system-node-critical",
    "maxUnavailable": "10%",
    "metrics": {"port": 9999, "podMonitor": {"enabled": True, "labels": {"release": "p"}}},
    "networkPolicy": {
        "clientsFrom": [{"podSelector": {}}],
        "egress": [{"ports": [{"protocol": "TCP", "port": 6379}]}],
    },
    "serviceAccount": {"annotations": {"a": "b"}},
    "podAnnotations": {"c": "d"},
    "podLabels": {"e": "f"},
}  # fmt: skip


def test_chart_has_no_finding_of_helm():
    """A message of severity 1 is about a missing icon."""
    result = helm("lint", CHART)
    assert result["TotalChartsLinted"] == 1
    assert not result["Errors"]
    assert [each for each in result["Messages"] if each["Severity"] > 1] == []


def test_chart_can_be_packed(tmp_path: Path):
    with tarfile.open(helm("package", CHART, tmp_path)) as archive:
        names = archive.getnames()
    assert "kvcodec/values.schema.json" in names
    assert "kvcodec/templates/daemonset.yaml" in names


def test_chart_is_of_the_version_of_the_project():
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert project is not None
    assert chart["appVersion"] == project[1]
    base_file = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())
    assert base_file["images"][0]["newTag"] == project[1]


def test_chart_makes_what_the_kustomization_makes(release: list[Tree], base: list[Tree]):
    """Two ways to the same pod. Names, labels and the order of keys may differ."""
    pods = []
    for objects in (release, base):
        spec = of_kind(objects, "DaemonSet")["spec"]
        pod = spec["template"]["spec"]
        pod.pop("serviceAccountName")
        for container in [*pod["containers"], *pod["initContainers"]]:
            container.pop("imagePullPolicy", None)
        pod["volumes"][0].pop("configMap")
        pods.append((spec["updateStrategy"], pod))
    assert pods[0] == pods[1]
    policies = [of_kind(objects, "NetworkPolicy")["spec"] for objects in (release, base)]
    for key in ("ingress", "egress", "policyTypes"):
        assert policies[0][key] == policies[1][key]


def test_release_is_valid_and_restricted(release: list[Tree], tmp_path: Path):
    assert_valid(release, tmp_path)
    pod = of_kind(release, "DaemonSet")["spec"]["template"]["spec"]
    assert_sidecar(pod, of_kind(release, "ConfigMap")["data"]["kvcodec.yaml"], tmp_path)


def test_values_are_honoured(tmp_path: Path):
    objects = installed(FULL)
    monitor = of_kind(objects, "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "p"
    objects.remove(monitor)
    assert_valid(objects, tmp_path)
    daemon_set = of_kind(objects, "DaemonSet")["spec"]
    pod, labels = daemon_set["template"]["spec"], daemon_set["template"]["metadata"]["labels"]
    assert_sidecar(pod, of_kind(objects, "ConfigMap")["data"]["kvcodec.yaml"], tmp_path)
    assert "initContainers" not in pod
    assert pod["containers"][0]["image"] == f"registry.example.com/kvcodec@sha256:{'0' * 64}"
    assert pod["containers"][0]["env"] == FULL["environment"]
    assert pod["containers"][0]["envFrom"] == FULL["environmentFrom"]
    assert pod["securityContext"]["runAsUser"] == 1000700000
    assert pod["volumes"][-1]["secret"]["secretName"] == "kvcodec-tls"
    assert pod["terminationGracePeriodSeconds"] == 71
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["imagePullSecrets"] == FULL["imagePullSecrets"]
    assert daemon_set["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == "10%"
    assert labels["e"] == "f"
    policy = of_kind(objects, "NetworkPolicy")["spec"]
    assert policy["ingress"][1] == {
        "from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": 9470}],
    }  # fmt: skip
    assert policy["egress"] == FULL["networkPolicy"]["egress"]


def test_what_may_be_left_out_is(tmp_path: Path):
    values = {"networkPolicy": {"enabled": False}, "serviceAccount": {"create": False}}
    objects = installed(values)
    assert {each["kind"] for each in objects} == {"ConfigMap", "DaemonSet", "Service"}
    pod = of_kind(objects, "DaemonSet")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "default"
    assert_valid(objects, tmp_path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ram_bytes": "1GiB"}, "ram_bytes"),
        ({"config": {"listen": {"unix": "/tmp/x.sock"}}}, "listen"),
        ({"config": {"http": {"address": ""}}}, "http"),
        ({"config": {"stor": {"url": "memory://"}}}, "stor"),
        ({"metrics": {"port": 80}}, "port"),
        ({"user": 0}, "user"),
        ({"run": {"hostPath": "run/kvcodec"}}, "hostPath"),
        ({"image": {"digest": "sha256:abc"}}, "digest"),
        ({"maxUnavailable": 0}, "maxUnavailable"),
    ],
    ids=str,
)
def test_schema_refuses_a_value_that_cannot_be_honoured(values: Tree, reason: str):
    with pytest.raises(AssertionError, match=reason):
        helm("install", CHART, json.dumps(values))
