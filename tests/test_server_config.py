"""Settings of the sidecar: names, values, sources, precedence, mistakes."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcodec.errors import ConfigError
from kvcodec_server.config import RELOADABLE, Address, Limits, configured, setting_names
from kvcodec_server.options import ServerOptions
from kvcodec_server.sources import (
    MAX_FILE_BYTES,
    from_environment,
    from_file,
    from_flags,
    gathered,
    variable_of,
)

KVCODEC = [sys.executable, "-c", "import sys; from kvcodec.cli import main; sys.exit(main())"]
URL = {"KVCODEC__STORE__URL": "memory://"}
DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "sidecar.md").read_text()

# For some settings two values that differ from the default and from each other, as text.
VALUES = {
    "store.url": ("memory://a", "file:///b"),
    "store.create": ("false", "no"),
    "store.ram_bytes": ("1MiB", "4096"),
    "listen.unix": ("/tmp/a.sock", "/tmp/b.sock"),
    "listen.unix_mode": ("0600", "0666"),
    "listen.tcp": ("127.0.0.1:1", "localhost:2"),
    "http.address": ("127.0.0.1:1", ""),
    "access.uids": ("1", "2"),
    "limits.max_streams": ("3", "5"),
    "limits.drain_seconds": ("1", "2.5"),
    "log.level": ("debug", "ERROR"),
    "tracing.sample_ratio": ("0.5", "1"),
}


def load(*flags, environment=None, path=None):
    return gathered(flags, URL | (environment or {}), str(path) if path else None)


def origins(configuration):
    return {name: origin for name, _, origin in configuration.rows()}


def written(tmp_path, suffix, names):
    """A file of this kind with the first value of some settings."""
    tree: dict[str, dict[str, str]] = {}
    for name in names:
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = VALUES[name][0]
    path = tmp_path / f"sidecar{suffix}"
    if suffix == ".toml":
        lines = [
            f"[{section}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in keys.items())
            for section, keys in tree.items()
        ]
        path.write_text("".join(lines))
    elif suffix == ".json":
        path.write_text(json.dumps(tree))
    else:
        path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("configuration")


class TestPrecedence:
    @given(
        suffix=st.sampled_from([".yaml", ".yml", ".toml", ".json"]),
        sources=st.dictionaries(
            st.sampled_from(sorted(VALUES)),
            st.sets(st.sampled_from(["file", "environment", "flag"])),
        ),
    )
    @settings(max_examples=100, deadline=None)
    def test_flags_beat_environment_beats_file_beats_default(self, directory, suffix, sources):
        """For every setting, in any combination of sources, and the origin says who won."""
        sources = {"store.url": {"file"}} | {
            name: set(found) for name, found in sources.items() if found or name != "store.url"
        }
        path = written(directory, suffix, [n for n, found in sources.items() if "file" in found])
        environment, flags = {}, []
        for name, found in sources.items():
            # The value that must not win is the one with the higher index of the two.
            if "environment" in found:
                environment[variable_of(name)] = VALUES[name][1]
            if "flag" in found:
                flags += [f"--{name}", VALUES[name][0]]
        got = gathered(flags, environment, str(path))
        for name in setting_names():
            found = sources.get(name, set())
            assert origins(got)[name] == (
                f"flag --{name}"
                if "flag" in found
                else f"environment {variable_of(name)}"
                if "environment" in found
                else f"file {path}"
                if "file" in found
                else "default"
            )
            if found:
                wanted = VALUES[name][not {"flag"} & found and "environment" in found]
                alone = gathered([f"--{name}={wanted}"], URL)
                assert got.value(name) == alone.value(name)

    def test_values_differ_from_their_defaults(self):
        default = load()
        for name, texts in VALUES.items():
            loaded = [load(f"--{name}={text}").value(name) for text in texts]
            assert default.value(name) not in loaded or name == "store.url"
            assert loaded[0] != loaded[1] or name == "store.create"

    def test_file_is_named_by_flag_or_variable(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("store: {url: 'memory://file'}")
        named = gathered([], {"KVCODEC__CONFIG": str(path)})
        assert named.settings.store.url == "memory://file"
        other = tmp_path / "b.yaml"
        other.write_text("store: {url: 'memory://other'}")
        assert (
            gathered([], {"KVCODEC__CONFIG": str(path)}, str(other)).settings.store.url
            == "memory://other"
        )


class TestSources:
    def test_both_forms_of_a_flag(self):
        given = from_flags(["--limits.max-streams=3", "--log.level", "debug"])
        assert {name: each.value for name, each in given.items()} == {
            "limits.max_streams": "3",
            "log.level": "debug",
        }

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--limits.max_stream=3"], "did you mean --limits.max_streams"),
            (["--zzz"], "known: --store.url"),
            (["store.url"], "belongs to no setting"),
            (["--store.url"], "needs a value"),
            (["--log.level=info", "--log.level=info"], "given twice"),
        ],
    )
    def test_mistaken_flags(self, words, message):
        with pytest.raises(ConfigError, match=message):
            from_flags(words)

    def test_unknown_variable_proposes_the_nearest(self):
        with pytest.raises(ConfigError, match="did you mean KVCODEC__LIMITS__MAX_STREAMS"):
            from_environment({"KVCODEC__LIMITS__MAX_STREAM": "3"})

    def test_variable_with_too_few_underscores_is_an_error(self):
        with pytest.raises(ConfigError, match="sets nothing: write KVCODEC__STORE__URL"):
            from_environment({"KVCODEC_STORE_URL": "memory://"})

    def test_other_variables_are_none_of_our_business(self):
        """Kubernetes sets such for a service that is called kvcodec."""
        assert not from_environment(
            {"KVCODEC_PORT": "tcp://10.0.0.1:80", "KVCODEC_SERVICE_HOST": "x", "PATH": "/"}
        )

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.yaml", "stor: {url: x}", "did you mean store"),
            ("a.yaml", "store: {ulr: x}", "did you mean store.url"),
            ("a.yaml", "store: {url: x, url: y}", "appears twice"),
            ("a.yaml", "store: [url]", "store is a section"),
            ("a.yaml", "- store", "wanted sections"),
            ("a.yaml", "store: {url: {a: b}}", "one value or a list"),
            ("a.yaml", "store: {url: !!python/object:os.x y}", "cannot be read"),
            ("a.yaml", "store: [", "cannot be read"),
            ("a.json", '{"store": {"url": "x", "url": "y"}}', "appears twice"),
            ("a.json", "[" * 100_000, "cannot be read"),
            ("a.toml", "[store]\nurl = 1\nurl = 2", "cannot be read"),
            ("a.ini", "", "ends in .json, .toml, .yaml, .yml"),
            ("a.yaml", "\udcff", "cannot be read"),
            ("a.yaml", "#" * (MAX_FILE_BYTES + 1), "longer than"),
        ],
    )
    def test_mistaken_files(self, tmp_path, name, text, message):
        path = tmp_path / name
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ConfigError, match=message):
            from_file(path)

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
            from_file(tmp_path / "nowhere.yaml")

    def test_empty_file_and_empty_section_say_nothing(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("store:\nlog: {}\n")
        assert not from_file(path)

    def test_references_that_multiply_are_refused_quickly(self, tmp_path):
        lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"] + [
            f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]"
            for before, name in zip("abcdefgh", "bcdefghi", strict=True)
        ]
        path = tmp_path / "a.yaml"
        path.write_text("store:\n" + "\n".join("  " + line for line in lines))
        with pytest.raises(ConfigError, match=r"store\.a"):
            from_file(path)
        path.write_text(path.read_text().replace("  i:", "  url:"))
        with pytest.raises(ConfigError):
            from_file(path)

    def test_random_files_are_read_or_refused(self, tmp_path):
        """1,000 files of text that looks like YAML: a configuration or a ConfigError."""
        random_ = random.Random(0)
        words = [*setting_names(), *"{}[]:,-&*!|>'\"#%@ \n\t01", "store", "url", "true", "1e9"]
        words += ["\n  ", ": ", "limits:\n  max_streams: ", "store:\n  url: memory://\n"]
        path = tmp_path / "a.yaml"
        accepted = 0
        for _ in range(1000):
            path.write_text("".join(random_.choices(words, k=random_.randrange(1, 12))))
            try:
                load(path=path)
            except ConfigError:
                continue
            accepted += 1
        assert 0 < accepted < 1000


class TestValues:
    def test_limits_are_those_of_the_server(self):
        """Each option of `ServerOptions` is a setting, and arrives where it belongs."""
        options = {field.name for field in fields(ServerOptions)} - {"allowed_uids"}
        assert set(Limits.model_fields) - {"drain_seconds"} == options
        for name in options - {"max_streams"}:
            default = getattr(ServerOptions(), name)
            wanted = type(default)(default * 2 if name != "breaker_failures" else 7)
            if name == "codec_threads":
                wanted = 3
            got = load(f"--limits.{name}={wanted}").settings.server_options
            assert got == ServerOptions(**{name: wanted})

    def test_uids_reach_the_server(self):
        options = load("--access.uids=10,20").settings.server_options
        assert options.allowed_uids == {10, 20}

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("limits.max_streams", "true", "valid integer"),
            ("limits.max_streams", "-1", "greater than or equal"),
            ("limits.max_streams", "128", "streams may not have them all"),
            ("limits.staging_bytes", "64XB", "wanted a number of bytes such as"),
            ("limits.drain_seconds", "nan", "greater than or equal"),
            ("limits.drain_seconds", "inf", "less than or equal"),
            ("limits.grpc_threads", "1", "grpc_threads is 1, allowed"),
            ("listen.tcp", "127.0.0.1", "wanted host:port"),
            ("listen.tcp", "127.0.0.1:66000", "wanted host:port"),
            ("listen.unix_mode", "9999", "octal"),
            ("log.level", "loud", "'debug', 'info', 'warning' or 'error'"),
            ("store.url", "", "at least 1 character"),
            ("store.namespaces", "xyz", "match pattern"),
            ("tracing.sample_ratio", "2", "less than or equal"),
            ("listen.unix", "", "nothing to listen on"),
            ("tls.key", "x", "go together"),
            ("tls.client_ca", "x", "needs tls.certificate"),
            ("tls.client_names", "x", "needs tls.client_ca"),
            ("listen.tcp", "0.0.0.0:1", "without TLS"),
        ],
    )
    def test_refused_values_name_the_way_out(self, name, text, message):
        with pytest.raises(ConfigError, match=message):
            load(f"--{name}={text}")

    def test_a_boolean_is_no_number(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("limits: {max_streams: true}")
        with pytest.raises(ConfigError, match="wanted a number"):
            load(path=path)

    def test_every_mistake_is_listed_with_its_origin(self):
        with pytest.raises(ConfigError) as caught:
            load("--log.level=loud", environment={"KVCODEC__LIMITS__MAX_STREAMS": "x"})
        assert "log.level is 'loud' (flag --log.level)" in str(caught.value)
        assert "(environment KVCODEC__LIMITS__MAX_STREAMS)" in str(caught.value)

    def test_two_tokens_are_one_too_many(self):
        with pytest.raises(ConfigError, match="set one of them"):
            load("--access.token=a", "--access.token_file=b")

    def test_plain_text_off_this_machine_has_to_be_wanted(self):
        load("--listen.tcp=0.0.0.0:1", "--access.plaintext=true")
        load("--listen.tcp=[::1]:1,127.0.0.9:2,localhost:3")

    def test_missing_store_says_how_to_set_it(self):
        with pytest.raises(ConfigError, match=r"--store\.url URL"):
            configured({})

    def test_modes_in_every_format(self, tmp_path):
        for name, text in (
            ("a.yaml", "listen: {unix_mode: 0640}"),
            ("b.yaml", "listen: {unix_mode: '640'}"),
            ("a.toml", "[listen]\nunix_mode = 0o640"),
            ("a.json", '{"listen": {"unix_mode": "0640"}}'),
        ):
            path = tmp_path / name
            path.write_text(text)
            assert load(path=path).settings.listen.unix_mode == 0o640
        path = tmp_path / "wrong.json"
        path.write_text('{"listen": {"unix_mode": 660}}')  # meant octal, and says 01224
        with pytest.raises(ConfigError, match="less than or equal to 511"):
            load(path=path)

    @given(st.text(string.printable, max_size=30))
    @settings(max_examples=200, deadline=None)
    def test_any_text_is_an_address_or_refused(self, text):
        try:
            address = Address.parse(text)
        except ValueError:
            return
        assert Address.parse(str(address)) == address


class TestShowing:
    def test_secrets_are_starred_everywhere(self):
        secret = "hush-hush-hush-hush"
        got = gathered(
            [f"--access.token={secret}"],
            {"KVCODEC__STORE__URL": f"redis://user:{secret}@host/0?password={secret}"},
        )
        shown = {name: value for name, value, _ in got.rows()}
        assert shown["access.token"] == "***"
        assert secret not in repr(shown) and secret not in repr(got)
        with pytest.raises(ConfigError) as caught:
            gathered([f"--access.token={secret}", "--log.level=x"], URL)
        assert secret not in str(caught.value)

    def test_digest_follows_values_and_not_secrets(self):
        assert load().digest == load("--log.level=info").digest
        assert load().digest != load("--log.level=debug").digest
        assert (
            load("--access.token=1234567890123456").digest
            == load("--access.token=6543210987654321").digest
        )

    def test_change_is_told_by_name(self):
        assert load().changed(load("--log.level=debug", "--store.url=x://")) == {
            "log.level",
            "store.url",
        }

    def test_command_shows_every_setting_with_its_origin(self, tmp_path):
        path = tmp_path / "a.toml"
        path.write_text('[access]\ntoken = "0123456789abcdef"\n')
        command = [*KVCODEC, "config", "show", "--config", str(path)]
        command += ["--store.url", "memory://", "--origin"]
        environment = os.environ | {"KVCODEC__LIMITS__MAX_STREAMS": "4"}
        run = subprocess.run(
            [*command, "--json"], env=environment, check=True, capture_output=True, text=True
        )
        shown = json.loads(run.stdout)
        assert list(shown) == list(setting_names())
        assert shown["store.url"] == {"value": "memory://", "origin": "flag --store.url"}
        assert shown["access.token"] == {"value": "***", "origin": f"file {path}"}
        assert shown["limits.max_streams"]["origin"] == "environment KVCODEC__LIMITS__MAX_STREAMS"
        text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        rows = [line.split() for line in text.stdout.splitlines()]
        assert [row[0] for row in rows] == list(setting_names())
        assert ["store.create", "true", "default"] in rows

    def test_command_refuses_a_mistake_in_one_line(self):
        command = [*KVCODEC, "config", "show", "--store.urll", "x"]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        assert run.returncode == 1
        assert run.stdout == ""
        assert run.stderr.startswith("kvcodec: --store.urll is unknown; did you mean --store.url")


class TestDocument:
    def test_every_setting_is_documented_with_its_default_and_whether_it_reloads(self):
        rows = {
            cells[0].strip("` "): (cells[1].strip("` "), cells[2].strip())
            for line in DOCUMENT.splitlines()
            if line.startswith("| `") and len(cells := line.strip("|").split(" | ")) == 4
        }
        default = {name: value for name, value, _ in load().rows()}
        for name in setting_names():
            assert name in rows, f"{name} is not in docs/sidecar.md"
            text, reload = rows[name]
            assert reload == ("reload" if name in RELOADABLE else "restart"), name
            if name == "store.url":
                continue
            shown = default[name]
            if isinstance(shown, list):
                shown = ",".join(shown)
            if isinstance(shown, bool):
                shown = str(shown).lower()
            if isinstance(shown, int | float):
                parsed = load(f"--{name}={text}").value(name)
                assert parsed == shown, name
            else:
                assert text == shown, name
        assert set(rows) == set(setting_names())
