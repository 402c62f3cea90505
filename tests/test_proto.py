"""The messages: generated from what is there, in good form, and never changed under a client."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from real_server import STORES

from kvcodec_proto.v1 import pages_pb2, service_pb2

PROTO = Path(__file__).resolve().parents[1] / "proto"
#: The contract as it was published; `buf build -o baseline.binpb` in proto/ at a release.
BASELINE = PROTO / "baseline.binpb"


def buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("buf", path=f"{STORES / 'buf' / 'bin'}") or shutil.which("buf")
    if program is None:
        pytest.skip("buf is not installed; `make stores` does it where it can")
    return subprocess.run(
        [program, *arguments], cwd=PROTO, capture_output=True, text=True, check=False
    )


def test_messages_are_in_good_form():
    for arguments in (["lint"], ["format", "--diff", "--exit-code"]):
        run = buf(*arguments)
        assert run.returncode == 0, run.stdout + run.stderr


def test_no_message_changed_under_a_client():
    run = buf("breaking", "--against", BASELINE.name)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_change_under_a_client_would_be_found(tmp_path):
    shutil.copytree(PROTO, tmp_path / "proto")
    path = tmp_path / "proto" / "kvcodec_proto" / "v1" / "service.proto"
    path.write_text(path.read_text().replace("uint64 offset = 2", "uint32 offset = 2"))
    run = buf("breaking", str(tmp_path / "proto"), "--against", str(BASELINE))
    assert run.returncode != 0


def fields_of(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple[int, int, int]]:
    return {
        f"{message.name}.{field.name}": (field.number, field.type, field.label)
        for message in file.message_type
        for field in message.field
    }


@pytest.mark.parametrize("module", [pages_pb2, service_pb2])
def test_every_published_field_is_what_it_was(module):
    """Without buf: numbers and types alone."""
    published = descriptor_pb2.FileDescriptorSet.FromString(BASELINE.read_bytes())
    (before,) = [file for file in published.file if file.name == module.DESCRIPTOR.name]
    now = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(now)
    assert fields_of(before).items() <= fields_of(now).items()


@pytest.mark.parametrize("module", [pages_pb2, service_pb2])
def test_generated_code_is_of_the_files_beside_it(module):
    """By name, number and kind of every field and enum value; comments may differ."""
    text = (PROTO / module.DESCRIPTOR.name).read_text()
    declared = {
        (name, int(number))
        for name, number in re.findall(r"^\s+(?:[\w.<>, ]+ )?(\w+) = (\d+);", text, re.MULTILINE)
    }
    generated = set()
    for message in module.DESCRIPTOR.message_types_by_name.values():
        generated |= {(field.name, field.number) for field in message.fields}
    for enum in module.DESCRIPTOR.enum_types_by_name.values():
        generated |= {(value.name, value.number) for value in enum.values}
    assert generated == declared


def test_generated_code_runs_with_the_oldest_supported_libraries():
    for name in ("pages_pb2", "service_pb2"):
        text = (PROTO / "kvcodec_proto" / "v1" / f"{name}.py").read_text()
        assert "Protobuf Python Version: 6.31.1" in text
    text = (PROTO / "kvcodec_proto" / "v1" / "service_pb2_grpc.py").read_text()
    assert "GRPC_GENERATED_VERSION = '1.78.0'" in text
