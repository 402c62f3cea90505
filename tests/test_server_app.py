"""`kvcodec serve` as a process: what it listens on, how it drains, reloads and refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from sidecar_process import KVCODEC, NAME, SidecarProcess, exists, health_of
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.errors import BackendReadOnly
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1 import service_pb2_grpc as pb_grpc
from kvcodec_server.app import SERVICE

OTHER = f"{'a' * 32}/{'c' * 64}"
TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    """One that several tests look at, and none of them changes."""
    directory = tmp_path_factory.mktemp("sidecar")
    settings = {"store.ram_bytes": "1MiB", "store.url": f"file://{directory}/pages"}
    with SidecarProcess(directory, settings) as process:
        yield process


@contextmanager
def silent_store():
    """The URL of a store that takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def call_under_way(sidecar, seconds):
    """A call that takes so long, or to the end of the sidecar; its code is in the list."""
    codes: list[str] = []

    def call():
        with grpc.insecure_channel(sidecar.target) as channel:
            try:
                pb_grpc.PageServiceStub(channel).Exists(
                    pb.ExistsRequest(names=[NAME]), timeout=seconds
                )
                codes.append("OK")
            except grpc.RpcError as error:
                codes.append(error.code().name)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: sidecar.metric("kvcodec_calls_in_progress") == 1)
    yield codes
    thread.join()


class TestServing:
    def test_health_and_reflection_on_every_listener(self, sidecar):
        for target in (sidecar.unix_target, sidecar.target):
            with grpc.insecure_channel(target) as channel:
                assert health_of(channel) == "SERVING"
                assert health_of(channel, SERVICE) == "SERVING"
                assert health_of(channel, "kvcodec.v1.Other") == "NOT_FOUND"
                services = ProtoReflectionDescriptorDatabase(channel).get_services()
                assert {SERVICE, "grpc.health.v1.Health"} <= set(services)

    def test_pages_are_served_on_tcp_and_need_a_session_on_the_socket(self, sidecar):
        with grpc.insecure_channel(sidecar.target) as channel:
            assert exists(channel) == "OK"
        with grpc.insecure_channel(sidecar.unix_target) as channel:
            assert exists(channel) == "UNAUTHENTICATED"

    def test_sockets_have_the_permissions_asked_for(self, sidecar):
        for name in ("kvcodec.sock", "kvcodec.sock.region"):
            mode = (sidecar.socket.parent / name).stat().st_mode
            assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660

    def test_pages_travel_through_the_process_and_are_counted(self, sidecar):
        page = memoryview(bytearray(b"page" * 1000))
        store = open_backend(f"sidecar+unix://{sidecar.socket}")
        try:
            # The first call may come before the session is there.
            wait_until(lambda: store.put([NAME], [page], timeout_seconds=5) == [None])
            buffer = memoryview(bytearray(len(page)))
            assert store.get_into([NAME], [buffer], timeout_seconds=5) == [len(page)]
            assert buffer == page
            assert store.exists([NAME, OTHER], timeout_seconds=5) == [True, False]
            assert store.exists_prefix([NAME, OTHER], timeout_seconds=5) == 1
            stored = list(Path(sidecar.socket.parent, "pages").rglob(NAME.partition("/")[2] + "*"))
            assert store.delete([NAME, OTHER], timeout_seconds=5) == [True, False]
        finally:
            store.close()
        assert sidecar.metric('kvcodec_pages_total{op="put",result="ok"}') >= 1
        assert sidecar.metric('kvcodec_pages_total{op="get",result="ok"}') == 1
        assert sidecar.metric('kvcodec_bytes_total{kind="stored",op="get"}') == len(page)
        assert sidecar.metric('kvcodec_op_seconds_count{backend="tier+ram",op="get"}') == 1
        assert sidecar.metric('kvcodec_pages_total{op="exists",result="ok"}') == 2
        assert sidecar.metric('kvcodec_pages_total{op="exists",result="not_found"}') >= 2
        assert sidecar.metric('kvcodec_pages_total{op="delete",result="ok"}') == 1
        assert sidecar.metric('kvcodec_pages_total{op="delete",result="not_found"}') == 1
        # Memory lies in front of the store, and answered.
        assert sidecar.metric('kvcodec_tier_lookups_total{result="hit"}') >= 1
        assert stored

    def test_pages_on_http(self, sidecar):
        assert sidecar.get("/healthz") == (200, "alive\n")
        status, text = sidecar.get("/readyz")
        assert status == 200
        assert json.loads(text) == {"status": "serving", "store": "ok", "circuits_open": []}
        assert sidecar.get("/metrics")[0] == 200
        assert sidecar.get("/")[0] == 404

    def test_store_is_probed(self, sidecar):
        wait_until(lambda: sidecar.metric("kvcodec_store_up") == 1)
        assert 0 < sidecar.metric("kvcodec_store_probe_seconds") < 5

    def test_log_is_json_and_begins_with_what_is_served(self, sidecar):
        (line,) = sidecar.lines()[:1]
        assert str(line["message"]).startswith("kvcodec serves file://")
        assert {"time", "level", "logger", "config", "version", "isa"} <= set(line)

    def test_health_command(self, sidecar, tmp_path):
        def ask(*words):
            run = subprocess.run(
                [*KVCODEC, "health", *words], check=False, capture_output=True, text=True
            )
            return run.returncode, run.stdout, run.stderr

        assert ask(sidecar.unix_target)[:2] == (0, f"{sidecar.unix_target}: SERVING\n")
        code, text, _ = ask(sidecar.target, "--json")
        assert (code, json.loads(text)["status"]) == (0, "SERVING")
        code, _, error = ask(f"unix:{tmp_path}/nowhere.sock", "--timeout", "0.5")
        assert code == 4 and error.endswith("does not answer: UNAVAILABLE\n")

    def test_second_sidecar_leaves_the_first_alone(self, sidecar):
        run = subprocess.run(
            [*KVCODEC, "serve", "--store.url=memory://", f"--listen.unix={sidecar.socket}"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 1
        assert "another sidecar listens there" in run.stderr
        with grpc.insecure_channel(sidecar.unix_target) as channel:
            assert health_of(channel) == "SERVING"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"listen.tcp": "{target}"}, "listen.tcp {target}"),
            ({"http.address": "127.0.0.1:{http}"}, "http.address 127.0.0.1:{http}"),
            ({"store.url": "strange://x"}, "no backend for the URL"),
            ({"listen.unix": "/" + "x" * 120}, "longer than 100 bytes"),
            ({"access.token": "short"}, "shorter than 16 characters"),
            ({"store.url": "file:///nowhere", "store.create": "false"}, "nowhere"),
        ],
    )
    def test_what_cannot_be_had_ends_it_with_one_line(self, sidecar, tmp_path, settings, message):
        places = {"target": sidecar.target, "http": sidecar.http_port}
        flags = {"store.url": "memory://", "listen.unix": f"{tmp_path}/x.sock", "http.address": ""}
        flags |= {name: value.format(**places) for name, value in settings.items()}
        run = subprocess.run(
            [*KVCODEC, "serve", *(f"--{name}={value}" for name, value in flags.items())],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 1
        last = run.stderr.splitlines()[-1]
        assert last.startswith("kvcodec: ") and message.format(**places) in last
        assert "Traceback" not in run.stderr


class TestOtherSettings:
    def test_settings_that_change_what_is_served(self, tmp_path):
        """Namespaces, reflection, permissions and the form of the log, in one process."""
        settings = {
            "store.namespaces": "c" * 32,
            "listen.reflection": "false",
            "listen.unix_mode": "0600",
            "log.format": "text",
            "health.probe_seconds": "0",
        }
        with SidecarProcess(tmp_path, settings) as sidecar:
            store = open_backend(f"sidecar+unix://{sidecar.socket}")
            page = [memoryview(b"page")] * 2
            served = f"{'c' * 32}/{'d' * 64}"
            try:
                wait_until(lambda: store.put([served], page[:1], timeout_seconds=5) == [None])
                answers = store.put([NAME, served], page, timeout_seconds=5)
                assert isinstance(answers[0], BackendReadOnly) and answers[1] is None
                assert store.exists([NAME, served], timeout_seconds=5) == [False, True]
            finally:
                store.close()
            with grpc.insecure_channel(sidecar.target) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                    database.get_services()
            assert stat.S_IMODE(sidecar.socket.stat().st_mode) == 0o600
            assert " info kvcodec_server.app: kvcodec serves memory://" in sidecar.log()
            assert "kvcodec_store_up" not in sidecar.get("/metrics")[1]

    def test_without_http_and_tcp_only_the_socket_is_there(self, tmp_path):
        class Quiet(SidecarProcess):
            def is_ready(self):
                with grpc.insecure_channel(self.unix_target) as channel:
                    return health_of(channel) == "SERVING"

        quiet = Quiet(tmp_path, {"http.address": "", "listen.tcp": ""})
        quiet._ready = quiet.is_ready
        with quiet as sidecar:
            assert sidecar.get("/healthz")[0] == 0
            with grpc.insecure_channel(sidecar.target) as channel:
                assert health_of(channel) == "UNAVAILABLE"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
class TestOtherUsers:
    """Somebody else, whom the socket's permissions let in, and the sidecar perhaps not."""

    CALL = """
import os, sys, time
from kvcodec.backend import open_backend
# What he could not read later; gRPC imports some with its first channel.
import grpc, redis, kvcodec_server.client, kvcodec_server.service
grpc.insecure_channel("unix:/nowhere").close()
store = open_backend(sys.argv[1])
os.setuid(65534)
deadline = time.monotonic() + float(sys.argv[3])
while (answer := store.put([sys.argv[2]], [memoryview(b"page")], timeout_seconds=1)[0]):
    if time.monotonic() > deadline:
        sys.exit(f"{type(answer).__name__}: {answer}")
    time.sleep(0.05)
"""

    @pytest.mark.parametrize(("uids", "served"), [("1234", False), ("1234,65534", True)])
    def test_shared_memory_is_for_listed_users(self, uids, served):
        settings = {"access.uids": uids, "listen.unix_mode": "0666"}
        with (
            tempfile.TemporaryDirectory() as folder,  # pytest's own are closed to others
            SidecarProcess(Path(folder), settings) as sidecar,
        ):
            Path(folder).chmod(0o755)
            url = f"sidecar+unix://{sidecar.socket}"
            run = subprocess.run(
                [sys.executable, "-c", self.CALL, url, NAME, "30" if served else "1.5"],
                check=False,
                capture_output=True,
                text=True,
            )
        assert (run.returncode == 0) == served, run.stderr
        # Not by the permissions of the socket, which are open.
        assert served or "uid 65534 may not use this sidecar" in run.stderr


class TestEnd:
    def test_drain_lets_a_call_end_and_refuses_new_ones(self, tmp_path):
        with (
            silent_store() as url,
            SidecarProcess(tmp_path, {"store.url": url}) as sidecar,
            grpc.insecure_channel(sidecar.target) as channel,
        ):
            assert health_of(channel) == "SERVING"
            with call_under_way(sidecar, 2.0) as codes:
                sidecar.signal(signal.SIGTERM)
                wait_until(lambda: health_of(channel) == "NOT_SERVING")
                status, text = sidecar.get("/readyz")
                assert status == 503 and json.loads(text)["status"] == "draining"
                assert sidecar.get("/healthz")[0] == 200
                assert sidecar.metric("kvcodec_draining") == 1
                assert exists(channel) == "UNAVAILABLE"
                assert codes == []
            assert sidecar.wait() == 0
            # The store said nothing in time, which is no answer; nobody cut the call off.
            assert codes and codes[0] in ("OK", "DEADLINE_EXCEEDED")
            assert sidecar.messages().endswith("stopped")
            assert not sidecar.socket.exists()

    def test_calls_that_take_too_long_are_cut_off(self, tmp_path):
        settings = {"limits.drain_seconds": "0.3"}
        with silent_store() as url, SidecarProcess(tmp_path, settings | {"store.url": url}) as it:
            with call_under_way(it, 30.0) as codes:
                started = time.monotonic()
                it.signal(signal.SIGTERM)
                assert it.wait() == 4
                assert time.monotonic() - started < 20
            assert codes in (["UNAVAILABLE"], ["CANCELLED"])
            assert "cut off after 0.3 s" in it.messages()

    def test_second_signal_ends_it_at_once(self, tmp_path):
        settings = {"limits.drain_seconds": "60"}
        with (
            silent_store() as url,
            SidecarProcess(tmp_path, settings | {"store.url": url}) as sidecar,
            call_under_way(sidecar, 30.0),
        ):
            sidecar.signal(signal.SIGTERM)
            wait_until(lambda: "draining" in sidecar.messages())
            sidecar.signal(signal.SIGTERM)
            assert sidecar.wait(30) == 128 + signal.SIGTERM

    def test_second_signal_ends_it_even_if_the_main_thread_does_not_notice(self):
        # The main thread blocks signals and waits: what a signal just before a wait looks like.
        program = """
import signal, threading
from kvcodec_server.app import _end_at_next_signal
_end_at_next_signal()
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("waiting", flush=True)
threading.Event().wait()
"""
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline() == b"waiting\n"
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 128 + signal.SIGTERM
            finally:
                process.kill()

    def test_killed_sidecar_is_replaced_on_the_same_socket(self, tmp_path):
        with SidecarProcess(tmp_path) as sidecar:
            sidecar.kill()
            assert sidecar.socket.exists()
            sidecar.start()
            with grpc.insecure_channel(sidecar.unix_target) as channel:
                assert health_of(channel) == "SERVING"


class TestStoreAway:
    def test_sidecar_without_its_store_is_ready_and_says_what_is_wrong(self, tmp_path):
        settings = {"store.url": "redis://127.0.0.1:1", "health.probe_seconds": "0.2"}
        with SidecarProcess(tmp_path, settings) as sidecar:
            wait_until(lambda: "write" in sidecar.get("/readyz")[1])
            status, text = sidecar.get("/readyz")
            assert status == 200
            assert json.loads(text)["store"] == {"write": "error", "read": "error"}
            assert sidecar.metric("kvcodec_store_up") == 0
            with grpc.insecure_channel(sidecar.target) as channel:
                assert health_of(channel) == "SERVING"
            store = open_backend(f"sidecar://{sidecar.target}")
            for _ in range(4):
                store.get_into([NAME], [memoryview(bytearray(64))], timeout_seconds=2)
            store.close()
            wait_until(lambda: sidecar.metric('kvcodec_circuit_state{circuit="reads"}') == 1)


class TestReload:
    def test_hangup_applies_limits_and_level_and_names_the_rest(self, tmp_path):
        path = tmp_path / "sidecar.yaml"
        path.write_text("limits: {max_objects: 2}\nlog: {level: info}\n")
        arguments = ("--config", str(path))
        with SidecarProcess(tmp_path, arguments=arguments) as sidecar:
            channel = grpc.insecure_channel(sidecar.target)

            def objects_allowed(count):
                try:
                    names = [f"{'a' * 32}/{number:064x}" for number in range(count)]
                    pb_grpc.PageServiceStub(channel).Exists(
                        pb.ExistsRequest(names=names), timeout=5
                    )
                except grpc.RpcError:
                    return False
                return True

            def reload(text, message):
                path.write_text(text)
                sidecar.signal(signal.SIGHUP)
                wait_until(lambda: message in sidecar.messages())

            assert objects_allowed(2) and not objects_allowed(3)
            reload("limits: {max_objects: 3}\nlisten: {reflection: false}\n", "reloaded: limits")
            wait_until(lambda: "restart changes listen.reflection" in sidecar.messages())
            assert objects_allowed(3) and not objects_allowed(4)

            reload("limits: {max_objects: 9, max_streams: 999}\n", "stays as it was")
            assert objects_allowed(3) and not objects_allowed(4)
            wait_until(lambda: sidecar.metric("kvcodec_config_last_reload_successful") == 0)
            reload("limits: {max_objcts: 9}\n", "did you mean limits.max_objects")
            assert not objects_allowed(4)

            reload("access: {token: " + TOKEN + "}\n", "reloaded: access.token")
            wait_until(lambda: sidecar.metric("kvcodec_config_last_reload_successful") == 1)
            assert exists(channel) == "UNAUTHENTICATED"
            assert exists(channel, TOKEN) == "OK"
            assert TOKEN not in sidecar.log()

            before = len(sidecar.lines())
            reload(f"access: {{token: {TOKEN}}}\nlog: {{level: error}}\n", "reloaded")
            sidecar.signal(signal.SIGHUP)
            sidecar.signal(signal.SIGHUP)
            time.sleep(0.3)
            assert len(sidecar.lines()) <= before + 1
            channel.close()
