"""The checks of `lmcache_contract.py`, which need the Python that has LMCache."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from real_server import need
from server_lmcache import ENVIRONMENT, PYTHON

TESTS = Path(__file__).parent


def test_lmcache_is_as_kvcodec_expects_it():
    run = subprocess.run(
        [need(PYTHON), "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["-p", "no:xdist", str(TESTS / "lmcache_contract.py")],
        env=os.environ | ENVIRONMENT,
        cwd=TESTS,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, (
        "LMCache is not what kvcodec.lmcache was written for; SUPPORTED_RELEASES of "
        f"kvcodec/lmcache/server_module.py names the releases it was tested with.\n{run.stdout}"
    )
