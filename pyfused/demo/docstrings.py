"""A small text classification data set that every machine with Python has: the docstrings of the standard library.

A docstring's label is the top-level package it was written in: of the sixteen ``CANDIDATES`` the first twelve that the
running Python has. CPython 3.11.7 has all of them, which makes 3,319 docstrings, 2,209 to train on and 1,110 to test
on; the largest class is tkinter with 18.8 %. What makes the task an honest one:

* split by source file: no file gives texts to both sides. The held-out files are listed in ``heldout_files.txt``; a
  file that is not listed (another Python may have others) is training data;
* no text twice, neither within a side nor across the two: only the first place of a text counts;
* the names of all sixteen packages are masked, also inside longer words (``HTTPServer``), so that neither a name nor
  its absence gives the label away.

Only the standard library is needed here: sources are read with ``ast``, nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# By the number of docstrings. Linux distributions ship some of the large ones apart from Python, and later Pythons lack
# distutils and lib2to3.
CANDIDATES = (
    "tkinter",
    "idlelib",
    "distutils",
    "asyncio",
    "email",
    "importlib",
    "logging",
    "lib2to3",
    "xml",
    "multiprocessing",
    "unittest",
    "http",
    "urllib",
    "wsgiref",
    "xmlrpc",
    "concurrent",
)
CLASSES = 12
# A package with fewer is not there: Debian leaves a stub of distutils. concurrent, the smallest, has 40.
MIN_DOCSTRINGS = 30
MIN_CHARACTERS = 40
# Salts of the splits of the training files that hyper-parameters are chosen on.
FOLDS = ("", "1", "2")
HELDOUT_LIST = Path(__file__).with_name("heldout_files.txt")

# As their own texts write them, too. Longer names first, so that "xmlrpc" is not taken for "xml".
_NAMES = sorted([*CANDIDATES, "xml-rpc", "idle", "2to3"], key=len, reverse=True)
_NAME_PATTERN = re.compile("|".join(map(re.escape, _NAMES)), re.IGNORECASE)
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Docstring:
    """One text of the data set: ``label`` is an index into the packages, ``file`` is relative to the library."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class Dataset:
    """The two sides, each in the order of packages, of file names, and of lines within a file."""

    packages: tuple[str, ...]
    train: list[Docstring]
    test: list[Docstring]


def mask_names(text: str, mask: str) -> str:
    """``text`` with each name of a candidate, in any case and also inside a word, replaced by ``mask``."""
    return _NAME_PATTERN.sub(lambda _: mask, text)


def load(mask: str = "[MASK]", library: Path | None = None) -> Dataset:
    """Reads the data set from the running Python's standard library.

    Args:
        mask: what stands for a package's name; the tokenizer's mask token is one token.
        library: folder of the standard library's sources; None: that of the running Python.

    Raises:
        FileNotFoundError: fewer than ``CLASSES`` packages are there, as on a Python shipped without sources.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[tuple[str, str]]] = {}
    for package in CANDIDATES:
        texts = list(_texts(library, package))
        if len(texts) >= MIN_DOCSTRINGS:
            found[package] = texts
        if len(found) == CLASSES:
            break
    else:
        missing = [package for package in CANDIDATES if package not in found]
        raise FileNotFoundError(
            f"{library} has sources of {len(found)} of {len(CANDIDATES)} packages, {CLASSES} are needed; without: "
            f"{', '.join(missing)}. Install Python's library sources."
        )
    everything = _drop_repeated(
        Docstring(mask_names(text, mask), label, file)
        for label, texts in enumerate(found.values())
        for text, file in texts
    )
    return _split(tuple(found), everything, heldout_files())


def hold_out(data: Dataset, salt: str = "") -> Dataset:
    """Splits the training side by file once more, by the same rule; the new ``test`` is a validation side.

    Args:
        data: of which the test side is not looked at.
        salt: another one leads to another split; ``FOLDS`` are those of the cross-validation.
    """
    return _split(data.packages, data.train, choose_heldout(data.train, salt))


def choose_heldout(docstrings: Iterable[Docstring], salt: str = "") -> frozenset[str]:
    """The rule behind the list: in each package the files that together have nearest to a third of its docstrings.

    Files are taken up in the order of the SHA-256 of ``salt`` and their names. Of the sets with one number of
    docstrings the first that is complete counts; of two numbers equally near to a third, the smaller one.
    """
    sizes = Counter((docstring.label, docstring.file) for docstring in docstrings)
    order = sorted(sizes, key=lambda key: hashlib.sha256((salt + key[1]).encode()).digest())
    chosen: set[str] = set()
    for label in {label for label, _ in sizes}:
        sums: dict[int, tuple[str, ...]] = {0: ()}  # number of docstrings: files
        for file in (file for of, file in order if of == label):
            for total, files in list(sums.items()):
                sums.setdefault(total + sizes[label, file], (*files, file))
        everything = max(sums)
        chosen.update(sums[min(sums, key=lambda total: (abs(3 * total - everything), total))])
    return frozenset(chosen)


def heldout_files() -> frozenset[str]:
    """Names of the test side's files, relative to the library."""
    lines = HELDOUT_LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def _split(packages: tuple[str, ...], docstrings: list[Docstring], heldout: frozenset[str]) -> Dataset:
    return Dataset(
        packages,
        train=[docstring for docstring in docstrings if docstring.file not in heldout],
        test=[docstring for docstring in docstrings if docstring.file in heldout],
    )


def _texts(library: Path, package: str) -> Iterator[tuple[str, str]]:
    """Docstrings of a package, each with the name of its file, which is relative to the library."""
    folder = library / package
    names = (path.relative_to(library) for path in folder.rglob("*.py"))
    for name in sorted(name.as_posix() for name in names if not _TEST_FOLDERS & set(name.parts[:-1])):
        for text in _docstrings(library / name):
            yield text, name


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, long enough, with their white space joined to one line."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text is not None and len(text) >= MIN_CHARACTERS:
            yield " ".join(text.split())


def _drop_repeated(docstrings: Iterable[Docstring]) -> list[Docstring]:
    """The first of each text; texts that differ in case only count as one."""
    seen: dict[str, Docstring] = {}
    for docstring in docstrings:
        seen.setdefault(docstring.text.casefold(), docstring)
    return list(seen.values())
