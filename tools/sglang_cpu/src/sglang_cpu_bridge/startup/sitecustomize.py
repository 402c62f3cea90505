"""Run by Python at start when this directory is on ``PYTHONPATH``: installs the stand-ins.

A path instead of a ``.pth`` file in site-packages: only processes that ask for it are touched.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from sglang_cpu_bridge.stand_ins import install_stand_ins

install_stand_ins()

# This file hides any other sitecustomize (of a distribution or of a coverage tool): run that too.
_here = Path(__file__).resolve().parent
_others = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
