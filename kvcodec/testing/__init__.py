"""Test tools for people who write a backend: a conformance suite to subclass.

Importing it needs nothing but kvcodec; running the suite needs pytest and hypothesis, which
``pip install kvcodec[testing]`` brings. Nothing else in kvcodec imports this package.
"""

import sys

if "pytest" in sys.modules:
    # So that a failing assert of the suite shows its values, as one in a test file does.
    for _module in ("_argument_tests", "_backend_machine", "_store_under_test", "backend_tests"):
        sys.modules["pytest"].register_assert_rewrite(f"kvcodec.testing.{_module}")

from kvcodec.testing.backend_tests import BackendTests

__all__ = ["BackendTests"]
