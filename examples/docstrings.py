"""A small text classification data set that every machine with Python has: the docstrings of the standard library.

A docstring's label is the top-level package it was written in (twelve packages that every CPython from 3.10 on has).
What makes the task an honest one:

* split by source file: no file gives texts to both sides; the held-out files are listed in ``heldout_files.txt``, and
  a file that is not listed (a later Python may have new ones) is training data;
* no text twice, neither within a side nor across the two: a test text that also occurs in training is dropped from
  the test side, and a text that two packages share is kept once;
* the names of all twelve packages are masked, also inside longer words (``HTTPServer``), so that neither a name nor
  its absence gives the label away.

Only the standard library is needed here: sources are read with ``ast``, nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
)
MIN_CHARACTERS = 40
MAX_HELDOUT_SHARE = 0.36
HELDOUT_LIST = Path(__file__).with_name("heldout_files.txt")

# Longer names first, so that "xmlrpc" is not taken for "xml"; "XML-RPC" is the way its own texts write it.
_NAMES = sorted([*PACKAGES, "xml-rpc"], key=len, reverse=True)
_NAME_PATTERN = re.compile("|".join(map(re.escape, _NAMES)), re.IGNORECASE)
_TEST_FOLDERS = {"test", "tests"}


@dataclass(frozen=True)
class Docstring:
    """One text of the data set: ``label`` is an index into ``PACKAGES``, ``file`` is relative to the library."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class Dataset:
    """The two sides, each in the order of file names and of lines within a file."""

    train: list[Docstring]
    test: list[Docstring]


def mask_names(text: str, mask: str) -> str:
    """``text`` with each name of a package, in any case and also inside a word, replaced by ``mask``."""
    return _NAME_PATTERN.sub(lambda _: mask, text)


def load(mask: str = "[MASK]", library: Path | None = None) -> Dataset:
    """Reads the data set from the running Python's standard library.

    Args:
        mask: what stands for a package's name; the tokenizer's mask token is one token.
        library: folder of the standard library's sources; None: that of the running Python.

    Raises:
        FileNotFoundError: a package's sources are missing, as on a Python shipped without them.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    heldout = heldout_files()
    sides: dict[bool, list[Docstring]] = {False: [], True: []}
    for label, package in enumerate(PACKAGES):
        files = _source_files(library, package)
        if not files:
            raise FileNotFoundError(
                f"no sources of the package {package!r} in {library}: install Python's library sources"
            )
        for path in files:
            name = path.relative_to(library).as_posix()
            sides[name in heldout].extend(Docstring(mask_names(t, mask), label, name) for t in _docstrings(path))
    seen: set[str] = set()
    return Dataset(train=_drop_repeated(sides[False], seen), test=_drop_repeated(sides[True], seen))


def hold_out(docstrings: list[Docstring]) -> Dataset:
    """Splits once more by file, for a validation side: in each package as for the test side (``heldout_files.txt``)."""
    sizes = Counter((docstring.label, docstring.file) for docstring in docstrings)
    totals = Counter(docstring.label for docstring in docstrings)
    taken: Counter[int] = Counter()
    heldout = set()
    for label, file in sorted(sizes, key=lambda key: hashlib.sha256(key[1].encode()).digest()):
        if taken[label] + sizes[label, file] <= MAX_HELDOUT_SHARE * totals[label]:
            taken[label] += sizes[label, file]
            heldout.add(file)
    return Dataset(
        train=[docstring for docstring in docstrings if docstring.file not in heldout],
        test=[docstring for docstring in docstrings if docstring.file in heldout],
    )


def heldout_files() -> frozenset[str]:
    """Names of the test side's files, relative to the library."""
    lines = HELDOUT_LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def _source_files(library: Path, package: str) -> list[Path]:
    folder = library / package
    found = (p for p in folder.rglob("*.py") if not _TEST_FOLDERS & set(p.relative_to(folder).parts[:-1]))
    return sorted(found, key=lambda p: p.relative_to(library).as_posix())


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, long enough, with their white space joined to one line."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text is not None and len(text) >= MIN_CHARACTERS:
            yield " ".join(text.split())


def _drop_repeated(docstrings: list[Docstring], seen: set[str]) -> list[Docstring]:
    """The first of each text that is not in ``seen``, which grows; texts that differ in case only count as one."""
    kept = []
    for docstring in docstrings:
        key = docstring.text.casefold()
        if key not in seen:
            seen.add(key)
            kept.append(docstring)
    return kept
