"""Instructions per element of the AVX2 path: a speed that no noise on the machine changes.

Valgrind's simulator counts them. What is recorded holds for one compiler; another one may choose
otherwise, so the test then only looks at the order of magnitude. To record anew after an honest
change: ``python tests/test_instruction_counts.py``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvcodec import native
from kvcodec.spec import SectionCodec

HERE = Path(__file__).resolve().parent
RECORD = HERE / "native" / "instruction_counts.json"
CODECS = ("int4-g64", "int4-asym-g64", "int8-g128", "int2-asym-g64", "int4-channel-asym-g64")
OPERATIONS = ("encode", "decode")
REPETITIONS = (2, 10)


def compiler() -> str:
    """Name and major version of the compiler that built the library here."""
    text = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True)
    return f"g++ {text.stdout.split('.')[0]}"


def build(directory: Path) -> Path:
    """The small program, linked with the library under test."""
    library = Path(native.__file__).parent
    program = directory / "count_instructions"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", f"-I{library}", str(HERE / "native/count_instructions.cpp")]
        + [str(library / "libkvcodec.so"), f"-Wl,-rpath,{library}", "-o", str(program)],
        check=True,
    )
    return program


def instructions_per_element(program: Path, codec_name: str, operation: str) -> float:
    """Difference of two runs, over the elements of the additional repetitions."""
    codec = SectionCodec.parse(codec_name)
    options = int(codec.asymmetric) | int(codec.axis) << 1
    collected = []
    for repetitions in REPETITIONS:
        arguments = [operation, codec.bits, options, codec.group_size, repetitions]
        run = subprocess.run(
            ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program)]
            + [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        isa, elements = run.stdout.split()
        assert isa == "avx2", "the simulator knows no wider instruction set"
        found = re.search(r"Collected : (\d+)", run.stderr)
        assert found is not None
        collected.append(int(found.group(1)))
    return (collected[1] - collected[0]) / (int(elements) * (REPETITIONS[1] - REPETITIONS[0]))


def missing() -> str:
    """Why instructions cannot be counted here; empty if they can."""
    if "avx2" not in native.available_isas():
        return "this processor has no AVX2"
    absent = [name for name in ("valgrind", "g++") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


@pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("codec", CODECS)
def test_the_avx2_path_needs_no_more_instructions_than_recorded(
    tmp_path_factory: pytest.TempPathFactory, codec: str, operation: str
) -> None:
    """At most 3 % more instructions per element than recorded; a great deal fewer is news too."""
    record = json.loads(RECORD.read_text())
    directory = tmp_path_factory.getbasetemp() / "count"
    directory.mkdir(exist_ok=True)
    program = directory / "count_instructions"
    counted = instructions_per_element(
        program if program.exists() else build(directory), codec, operation
    )
    recorded = record["instructions_per_element"][codec][operation]
    assert counted < recorded * (1.03 if compiler() == record["compiler"] else 2)
    assert counted > recorded * (0.9 if compiler() == record["compiler"] else 0.2)


def main() -> None:
    """Record what the library needs now."""
    program = build(Path(sys.argv[1]))
    counts = {
        codec: {
            name: round(instructions_per_element(program, codec, name), 4) for name in OPERATIONS
        }
        for codec in CODECS
    }
    record = {"compiler": compiler(), "isa": "avx2", "instructions_per_element": counts}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
