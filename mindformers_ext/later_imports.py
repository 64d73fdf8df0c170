"""Import MindFormers without the packages of its text metrics and text data loaders.

Extends MindFormers 1.9.0, which imports nltk, jieba, rouge_chinese, datasets and pyarrow together with itself: 140 MiB
and two seconds of every process, for features that few runs use. Here MindFormers gets placeholders, and a package is
imported when something of it is first used; whoever else imports one gets the package itself. It can go when
MindFormers imports them where it uses them. What MindFormers says of itself meanwhile, such as which optional packages
are missing, is not heard, and makes no folder output/log in the current one.
"""

import importlib
import importlib.util
import logging
import os
import sys
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("nltk", "jieba", "rouge_chinese", "datasets", "pyarrow", "tensorboardX")


class Later:
    """`name` of `module`, which is imported when this is called, asked for an attribute or used in isinstance."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def _itself(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args, **kwargs):
        return self._itself()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._itself(), name)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self._itself())


class LaterModule(ModuleType):
    """A module all of whose names come later."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Later(self.__name__, name)


class Placeholders(MetaPathFinder, Loader):
    """Finds a LaterModule for every module of PACKAGES."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return LaterModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class MindFormersFinder(MetaPathFinder):
    """Waits for the import of MindFormers, and gives it placeholders as long as that import takes."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "mindformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: quietly(with_placeholders, execute, module)
        return spec


def with_placeholders(execute, module: ModuleType) -> None:
    """Execute a module while PACKAGES that are not imported yet are placeholders."""
    finder = Placeholders()
    sys.meta_path.insert(0, finder)
    try:
        execute(module)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, value in sys.modules.items() if isinstance(value, LaterModule)]:
            del sys.modules[name]


def quietly(work, *arguments) -> None:
    """Do work while MindFormers' logger prints nothing and writes its files into a folder that is gone afterwards."""
    path = os.environ.get("LOG_MF_PATH")
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as unread:
            os.environ["LOG_MF_PATH"] = unread
            work(*arguments)
    finally:
        logging.disable(logging.NOTSET)
        os.environ.pop("LOG_MF_PATH", None)
        if path is not None:
            os.environ["LOG_MF_PATH"] = path


def install() -> None:
    """From now on, import MindFormers with placeholders; without effect when it is imported already."""
    if "mindformers" not in sys.modules:
        sys.meta_path.insert(0, MindFormersFinder())
