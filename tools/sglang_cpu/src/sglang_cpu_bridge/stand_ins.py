"""Permissive stand-ins for modules that SGLang imports but never calls on a CPU.

``torchvision`` from a package index does not import beside a CPU build of torch ("operator
torchvision::nms does not exist"), and ``sgl_kernel`` is published for CUDA only. A stand-in lets
``import``, ``from ... import`` and subclassing pass and fails loudly when something is called.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

STAND_IN_NAMES = ("torchvision", "sgl_kernel")


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


class _Name:
    """A lower-case name of a stood-in module: may be passed about, may not be called."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"<stand-in for {self._path}>"

    def __getattr__(self, name: str) -> _Name:
        if _is_special(name):
            raise AttributeError(name)
        return _Name(f"{self._path}.{name}")

    def __call__(self, *_args: object, **_options: object) -> NoReturn:
        raise RuntimeError(f"{self._path} was called, but only a stand-in for it is present")


class _ClassMembers(type):
    """Gives a stood-in class every member it is asked for (``InterpolationMode.BICUBIC``)."""

    def __getattr__(cls, name: str) -> object:
        if _is_special(name):
            raise AttributeError(name)
        return _Name(f"{cls.__module__}.{cls.__name__}.{name}")


class _StandIn(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "0.0.0"

    def __getattr__(self, name: str) -> object:
        if _is_special(name):
            raise AttributeError(name)
        value: object
        if name[:1].isupper():
            value = _ClassMembers(name, (), {"__module__": self.__name__})
        else:
            value = _Name(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers last, after all real finders, and not at all where CUDA is available."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in STAND_IN_NAMES:
            return None
        import torch

        if torch.cuda.is_available():
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def install_stand_ins() -> None:
    """Serves STAND_IN_NAMES to later imports of this process where no real module is found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
