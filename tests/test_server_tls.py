"""Who gets in over TCP: certificates, names and tokens, replaced while the sidecar runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from functools import partial

import grpc
import pytest
from sidecar_process import NAME, Authority, SidecarProcess, exists, health_of
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.errors import BackendError, ConfigError
from kvcodec.log import RateLimitedLog
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server.access import read_tokens
from kvcodec_server.app import SERVICE, logger
from kvcodec_server.tls import CertificateFiles, Certificates, not_after_seconds

TOKEN, OTHER_TOKEN = "0123456789abcdef-one", "0123456789abcdef-two"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("other"), "other-ca")


@pytest.fixture(scope="module", autouse=True)
def signed(authority, other_authority):
    authority.sign("server")
    authority.sign("client", "DNS:engine.example")
    authority.sign("late", "DNS:engine.example", days=-1)
    authority.sign("stranger", "DNS:stranger.example")
    other_authority.sign("server", days=5)
    other_authority.sign("client", "DNS:engine.example")


@pytest.fixture(scope="module")
def installed(tmp_path_factory, authority):
    """The files that the sidecar uses, which tests replace."""
    directory = tmp_path_factory.mktemp("installed")
    for source, target in (
        ("server.pem", "tls.crt"),
        ("server.key", "tls.key"),
        ("ca.pem", "ca.crt"),
    ):
        shutil.copy(authority.directory / source, directory / target)
    (directory / "tokens").write_text(f"{TOKEN}\n")
    return directory


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory, installed):
    settings = {
        "tls.certificate": str(installed / "tls.crt"),
        "tls.key": str(installed / "tls.key"),
        "tls.client_ca": str(installed / "ca.crt"),
        "tls.client_names": "engine.example",
        "access.token_file": str(installed / "tokens"),
    }
    with SidecarProcess(tmp_path_factory.mktemp("sidecar"), settings) as process:
        yield process


def channel_to(sidecar, authority, client=None, **options):
    """A channel that trusts `authority` and shows the certificate of `client`, if any."""
    root = authority.pem(authority.certificate.name)
    if client is None:
        credentials = grpc.ssl_channel_credentials(root)
    else:
        owner, name = client
        credentials = grpc.ssl_channel_credentials(
            root, owner.pem(f"{name}.key"), owner.pem(f"{name}.pem")
        )
    return grpc.secure_channel(sidecar.target, credentials, options=list(options.items()))


def ask(sidecar, authority, client=None, token=TOKEN, **options):
    with channel_to(sidecar, authority, client, **options) as channel:
        return exists(channel, token)


class TestClients:
    def test_right_certificate_and_token_are_served(self, sidecar, authority):
        assert ask(sidecar, authority, (authority, "client")) == "OK"

    def test_no_certificate_is_refused(self, sidecar, authority):
        assert ask(sidecar, authority) == "UNAVAILABLE"

    def test_no_tls_at_all_is_refused(self, sidecar):
        with grpc.insecure_channel(sidecar.target) as channel:
            assert exists(channel, TOKEN) == "UNAVAILABLE"

    def test_certificate_of_another_authority_is_refused(self, sidecar, authority, other_authority):
        assert ask(sidecar, authority, (other_authority, "client")) == "UNAVAILABLE"

    def test_expired_certificate_is_refused(self, sidecar, authority):
        assert ask(sidecar, authority, (authority, "late")) == "UNAVAILABLE"

    def test_wrong_name_is_refused_and_counted(self, sidecar, authority):
        assert ask(sidecar, authority, (authority, "stranger")) == "PERMISSION_DENIED"
        assert sidecar.metric('kvcodec_refused_calls_total{reason="name"}') >= 1

    def test_client_refuses_a_server_of_another_name(self, sidecar, authority):
        wrong = {"grpc.ssl_target_name_override": "elsewhere.example"}
        assert ask(sidecar, authority, (authority, "client"), **wrong) == "UNAVAILABLE"

    def test_client_refuses_a_server_of_another_authority(
        self, sidecar, authority, other_authority
    ):
        assert ask(sidecar, other_authority, (authority, "client")) == "UNAVAILABLE"

    def test_missing_and_wrong_tokens_are_refused_and_counted(self, sidecar, authority):
        for token in ("", "0123456789abcdef", TOKEN[:-1], TOKEN + "x"):
            assert ask(sidecar, authority, (authority, "client"), token) == "UNAUTHENTICATED"
        assert sidecar.metric('kvcodec_refused_calls_total{reason="token"}') >= 4

    def test_every_method_asks_for_the_token(self, sidecar, authority):
        methods = pb.DESCRIPTOR.services_by_name["PageService"].methods
        assert len(methods) > 8
        with channel_to(sidecar, authority, (authority, "client")) as channel:
            for method in methods:
                path = f"/{SERVICE}/{method.name}"
                if method.client_streaming:
                    call = partial(channel.stream_unary(path), iter([b""]))
                elif method.server_streaming:
                    call = partial(self.drained, channel.unary_stream(path))
                else:
                    call = partial(channel.unary_unary(path), b"")
                with pytest.raises(grpc.RpcError) as caught:
                    call(timeout=5)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name

    def drained(self, stream, timeout):
        return list(stream(b"", timeout=timeout))

    def test_store_url_has_all_of_it(self, sidecar, authority, installed):
        """What an engine elsewhere writes; and without the token it finds nothing."""
        url = f"sidecar://{sidecar.target}?tls=1&ca_file={authority.certificate}"
        url += "".join(
            f"&{name}_file={authority.directory / file}"
            for name, file in (("certificate", "client.pem"), ("key", "client.key"))
        )
        page, buffer = memoryview(b"page"), memoryview(bytearray(4))
        for token, result in ((f"&token_file={installed / 'tokens'}", None), ("", BackendError)):
            store = open_backend(url + token)
            try:
                (answer,) = store.put([NAME], [page], timeout_seconds=5)
                assert answer is None if result is None else type(answer) is result
                assert store.exists([NAME], timeout_seconds=5) == [result is None]
                if result is None:
                    assert store.get_into([NAME], [buffer], timeout_seconds=5) == [4]
                    assert buffer == page
            finally:
                store.close()

    def test_health_needs_a_certificate_and_no_token(self, sidecar, authority):
        with channel_to(sidecar, authority, (authority, "stranger")) as channel:
            assert health_of(channel) == "SERVING"
        with channel_to(sidecar, authority) as channel:
            assert health_of(channel) == "UNAVAILABLE"

    def test_the_socket_asks_for_neither(self, sidecar):
        with grpc.insecure_channel(sidecar.unix_target) as channel:
            assert health_of(channel) == "SERVING"
            # A session is what it asks for.
            assert exists(channel, "") == "UNAUTHENTICATED"
            assert sidecar.metric('kvcodec_refused_calls_total{reason="session"}') == 0


class TestRotation:
    """Each test leaves the files as it found them."""

    @pytest.fixture(autouse=True)
    def restored(self, installed):
        before = {path: path.read_bytes() for path in installed.iterdir()}
        yield
        for path, data in before.items():
            replace(path, data)

    def test_new_certificate_is_shown_without_a_signal(
        self, sidecar, authority, other_authority, installed
    ):
        """Server and trusted authority are replaced; a connection that exists goes on."""
        with channel_to(sidecar, authority, (authority, "client")) as old:
            assert exists(old, TOKEN) == "OK"
            before = sidecar.metric("kvcodec_tls_certificate_expiry_timestamp_seconds")
            replace(installed / "tls.crt", other_authority.pem("server.pem"))
            replace(installed / "tls.key", other_authority.pem("server.key"))
            replace(installed / "ca.crt", other_authority.pem("other-ca.pem"))
            wait_until(lambda: ask(sidecar, other_authority, (other_authority, "client")) == "OK")
            assert ask(sidecar, authority, (authority, "client")) == "UNAVAILABLE"
            assert exists(old, TOKEN) == "OK"
        after = sidecar.metric("kvcodec_tls_certificate_expiry_timestamp_seconds")
        assert after > before + 86400
        for name, data in (
            ("tls.crt", authority.pem("server.pem")),
            ("tls.key", authority.pem("server.key")),
            ("ca.crt", authority.pem("ca.pem")),
        ):
            replace(installed / name, data)
        wait_until(lambda: ask(sidecar, authority, (authority, "client")) == "OK")

    def test_half_a_rotation_changes_nothing(self, sidecar, authority, other_authority, installed):
        replace(installed / "tls.crt", other_authority.pem("server.pem"))
        time.sleep(1.1)
        for _ in range(3):
            assert ask(sidecar, authority, (authority, "client")) == "OK"
        wait_until(lambda: "the old certificate stays" in sidecar.messages())

    def test_unreadable_files_change_nothing(self, sidecar, authority, installed):
        (installed / "tls.key").unlink()
        time.sleep(1.1)
        assert ask(sidecar, authority, (authority, "client")) == "OK"

    def test_new_tokens_apply_after_the_signal(self, sidecar, authority, installed):
        def codes():
            return [
                ask(sidecar, authority, (authority, "client"), token)
                for token in (TOKEN, OTHER_TOKEN)
            ]

        replace(installed / "tokens", f"{TOKEN}\n{OTHER_TOKEN}\n".encode())
        sidecar.signal(signal.SIGHUP)
        wait_until(lambda: codes() == ["OK", "OK"])
        replace(installed / "tokens", f"{OTHER_TOKEN}\n".encode())
        sidecar.signal(signal.SIGHUP)
        wait_until(lambda: codes() == ["UNAUTHENTICATED", "OK"])
        replace(installed / "tokens", b"")
        sidecar.signal(signal.SIGHUP)
        wait_until(lambda: "has no token in it" in sidecar.messages())
        assert codes() == ["UNAUTHENTICATED", "OK"]
        replace(installed / "tokens", f"{TOKEN}\n".encode())
        sidecar.signal(signal.SIGHUP)
        wait_until(lambda: codes() == ["OK", "UNAUTHENTICATED"])


def replace(path, data):
    """As a careful writer does."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    os.replace(new, path)


class TestTLSWithoutClientCertificates:
    def test_clients_need_only_trust_the_server(self, tmp_path, authority):
        settings = {
            "tls.certificate": str(authority.directory / "server.pem"),
            "tls.key": str(authority.directory / "server.key"),
        }
        with SidecarProcess(tmp_path, settings) as sidecar:
            assert ask(sidecar, authority, token="") == "OK"
            with grpc.insecure_channel(sidecar.target) as channel:
                assert exists(channel) == "UNAVAILABLE"


class TestFiles:
    def load(self, **files):
        return Certificates(CertificateFiles(**files), RateLimitedLog(logger))

    def test_expiry_is_what_openssl_says(self, authority):
        for name in ("server.pem", "late.pem", "ca.pem"):
            run = subprocess.run(
                ["openssl", "x509", "-in", authority.directory / name, "-noout", "-enddate"],
                check=True,
                capture_output=True,
                text=True,
            )
            wanted = time.strptime(run.stdout.strip().partition("=")[2], "%b %d %H:%M:%S %Y %Z")
            got = time.gmtime(not_after_seconds(authority.pem(name)))
            assert got[:6] == wanted[:6]

    def test_garbage_is_no_certificate(self, authority):
        pem = authority.pem("server.pem")
        for data in (b"", b"x", pem[:100], pem.replace(b"M", b"", 40)):
            with pytest.raises(ValueError, match=r"."):
                not_after_seconds(data)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"certificate": "server.pem", "key": "client.key"}, "cannot be used"),
            ({"certificate": "server.key", "key": "server.key"}, "cannot be used"),
            ({"certificate": "server.pem", "key": "nowhere"}, "cannot be read"),
            (
                {"certificate": "server.pem", "key": "server.key", "client_ca": "server.key"},
                "tls.client_ca",
            ),
        ],
    )
    def test_files_that_do_not_fit_are_named(self, authority, files, message):
        paths = {name: str(authority.directory / file) for name, file in files.items()}
        with pytest.raises(ConfigError, match=message):
            self.load(**paths)

    def test_key_with_a_password_is_refused_and_nobody_is_asked(self, authority, tmp_path):
        key = tmp_path / "locked.key"
        command = ["openssl", "ec", "-aes128", "-passout", "pass:secret"]
        command += ["-in", str(authority.directory / "server.key"), "-out", str(key)]
        subprocess.run(command, check=True, capture_output=True)
        with pytest.raises(ConfigError, match="cannot be used"):
            self.load(certificate=str(authority.directory / "server.pem"), key=str(key))

    def test_whether_clients_are_asked_is_no_matter_of_a_reload(self, authority):
        files = {
            "certificate": str(authority.directory / "server.pem"),
            "key": str(authority.directory / "server.key"),
        }
        certificates = self.load(**files)
        with pytest.raises(ConfigError, match="restart"):
            certificates.reload(CertificateFiles(**files, client_ca=str(authority.certificate)))

    def test_links_that_are_turned_are_noticed(self, authority, other_authority, tmp_path):
        """Kubernetes replaces the folder that the files lie in."""
        for name, source in (("one", authority), ("two", other_authority)):
            (tmp_path / name).mkdir()
            for kind in ("pem", "key"):
                shutil.copy(source.directory / f"server.{kind}", tmp_path / name)
        (tmp_path / "now").symlink_to("one")
        certificates = self.load(
            certificate=str(tmp_path / "now" / "server.pem"),
            key=str(tmp_path / "now" / "server.key"),
        )
        certificates.look()
        assert certificates.reloads == 0
        (tmp_path / "next").symlink_to("two")
        os.replace(tmp_path / "next", tmp_path / "now")
        certificates.look()
        assert certificates.reloads == 1


class TestTokens:
    def test_tokens_are_lines_of_a_file_or_one_setting(self, tmp_path):
        path = tmp_path / "tokens"
        path.write_text(f"{TOKEN}\n\n{OTHER_TOKEN}\n")
        assert read_tokens("", str(path)) == (TOKEN.encode(), OTHER_TOKEN.encode())
        assert read_tokens(TOKEN, "") == (TOKEN.encode(),)
        assert read_tokens("", "") == ()

    @pytest.mark.parametrize("text", ["", "short", f"{TOKEN}\nshort"])
    def test_weak_files_are_refused(self, tmp_path, text):
        path = tmp_path / "tokens"
        path.write_text(text)
        with pytest.raises(ConfigError, match="token"):
            read_tokens("", str(path))

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_tokens("", str(tmp_path / "nowhere"))
