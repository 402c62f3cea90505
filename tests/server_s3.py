"""A real S3 server: Ceph's object gateway, its monitor, and one store in memory behind it.

with s3_server(folder) as server:
    server.endpoint             # http://127.0.0.1:PORT
    with server.gateway.stalled():
        ...
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from real_server import RealServer, answers_on, free_port, need

USER = "someone"
PASSWORD = "not-a-secret"

_CONFIGURATION = """
[global]
fsid = {cluster}
mon_host = [v2:127.0.0.1:{monitor_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = {folder}/keyring
run_dir = {folder}
crash_dir = {folder}
pid_file =
admin_socket =
log_file =
log_to_stderr = true
err_to_stderr = true
# One store, one copy: nothing has to wait for a second.
mon_allow_pool_size_one = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_crush_chooseleaf_type = 0
mon_data_avail_crit = 0
auth_allow_insecure_global_id_reclaim = false

[mon.a]
mon_data = {folder}/monitor
paxos_propose_interval = 0.05
paxos_min_wait = 0.01

[osd.0]
osd_data = {folder}/store
osd_objectstore = memstore
memstore_device_bytes = 4294967296

[client.gateway]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_data = {folder}/gateway
rgw_thread_pool_size = 64
"""
_USERS = {
    "mon.": ["mon", "allow *"],
    "client.admin": ["mon", "allow *", "osd", "allow *"],
    "osd.0": ["mon", "allow profile osd", "osd", "allow *"],
    "client.gateway": ["mon", "allow rwx", "osd", "allow rwx"],
}


@dataclass(frozen=True)
class S3Server:
    """What a test needs of it. `gateway` is the process that speaks S3."""

    gateway: RealServer
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A server with one user and no bucket; the test is skipped where it is not installed."""
    monitor, store, gateway = (
        need(f"/usr/bin/{name}") for name in ("ceph-mon", "ceph-osd", "radosgw")
    )
    monitor_port, port = free_port(), free_port()
    for name in ("monitor", "store", "gateway"):
        (folder / name).mkdir()
    cluster, identity = str(uuid.uuid4()), str(uuid.uuid4())
    (folder / "ceph.conf").write_text(
        _CONFIGURATION.format(cluster=cluster, folder=folder, monitor_port=monitor_port, port=port)
    )
    environment = {"CEPH_CONF": str(folder / "ceph.conf")}

    def run(*command: str | Path) -> None:
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment)

    keyring, monitors = folder / "keyring", folder / "monitors"
    run("/usr/bin/ceph-authtool", "--create-keyring", keyring)
    for user, caps in _USERS.items():
        grants = [
            word for pair in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", *pair)
        ]
        run("/usr/bin/ceph-authtool", keyring, "--name", user, "--gen-key", *grants)
    address = ("--addv", "a", f"[v2:127.0.0.1:{monitor_port}]")
    run("/usr/bin/monmaptool", "--create", "--fsid", cluster, *address, monitors)
    run(monitor, "--id", "a", "--mkfs", "--monmap", monitors, "--keyring", keyring)

    with ExitStack() as stack:

        def start(*command: str, ready_port: int | None = None) -> RealServer:
            ready = answers_on(ready_port) if ready_port else lambda: True
            server = RealServer(command, ready=ready, environment=environment)
            return stack.enter_context(server)

        start(monitor, "--id", "a", "--foreground", ready_port=monitor_port)
        run("/usr/bin/ceph", "osd", "new", identity, "0")
        run(store, "--id", "0", "--mkfs", "--osd-uuid", identity)
        start(store, "--id", "0", "--foreground")
        server = start(gateway, "--name", "client.gateway", "--foreground", ready_port=port)
        login = (f"--access-key={USER}", f"--secret-key={PASSWORD}")
        run("/usr/bin/radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *login)
        yield S3Server(server, port)
