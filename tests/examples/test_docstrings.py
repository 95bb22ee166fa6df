"""The rules that make the demo's data set an honest one, on this Python's library and on small made-up ones."""

from collections import Counter
from pathlib import Path

import docstrings
import pytest
from docstrings import PACKAGES


@pytest.fixture(scope="module")
def data() -> docstrings.Dataset:
    return docstrings.load()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library in which each package has one file with a docstring of its own."""
    for package in PACKAGES:
        write(tmp_path / package / "module.py", f"What is written in number {PACKAGES.index(package)} of the packages.")
    return tmp_path


def write(path: Path, docstring: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""{docstring}"""\n')


def test_every_package_is_on_both_sides(data):
    for side, least in ((data.train, 20), (data.test, 10)):
        counts = Counter(docstring.label for docstring in side)
        assert min(counts[label] for label in range(len(PACKAGES))) >= least


def test_sides_share_no_file(data):
    heldout = docstrings.heldout_files()
    assert not {docstring.file for docstring in data.train} & heldout
    assert {docstring.file for docstring in data.test} <= heldout


def test_no_text_twice(data):
    counts = Counter(docstring.text.casefold() for docstring in data.train + data.test)
    assert max(counts.values()) == 1


def test_no_name_of_a_package_is_left(data):
    for docstring in data.train + data.test:
        text = docstring.text.replace("[MASK]", "").casefold()
        assert not any(name in text for name in PACKAGES), docstring


def test_label_is_the_package_of_the_file(data):
    for docstring in data.train + data.test:
        assert docstring.file.startswith(PACKAGES[docstring.label] + "/")
        assert "test" not in docstring.file.split("/")[:-1]


def test_list_of_heldout_files_is_the_rule(data):
    # Counts differ a little from one Python to the next, so the shares do: the list is fixed, not the share.
    for label in range(len(PACKAGES)):
        train, test = (sum(d.label == label for d in side) for side in (data.train, data.test))
        assert 0.1 < test / (train + test) < 0.40
    assert docstrings.HELDOUT_LIST.read_text().count("\n") == len(docstrings.heldout_files()) + 3


def test_mask_takes_names_in_any_case_and_within_words():
    masked = docstrings.mask_names("An HTTPServer for XML-RPC, not xmlrpc.client nor XmlReader; https, Emails.", "#")
    assert masked == "An #Server for #, not #.client nor #Reader; #s, #s."


def test_text_on_both_sides_stays_in_training_only(library):
    same = "A text that stands in two files, one of them on the test side."
    write(library / "asyncio" / "tasks.py", same.upper())
    write(library / "email" / "new.py", same)
    data = docstrings.load(library=library)
    assert [d.file for d in data.train + data.test if d.text.casefold() == same.casefold()] == ["email/new.py"]


def test_short_and_nested_docstrings_and_test_folders(library):
    path = library / "logging" / "module.py"
    path.write_text(
        "class A:\n"
        '    """A class with words enough for it to be\n\n    taken."""\n'
        '    async def f(self):\n        """A coroutine with words enough for it to be taken."""\n'
        '    def g(self):\n        """Too short."""\n'
    )
    write(
        library / "logging" / "tests" / "module.py", "A test's docstring, of which there is to be nothing in the set."
    )
    texts = [d.text for d in docstrings.load(library=library).train if PACKAGES[d.label] == "logging"]
    assert texts == [
        "A class with words enough for it to be taken.",
        "A coroutine with words enough for it to be taken.",
    ]


def test_missing_sources_are_an_error(library):
    (library / "xml" / "module.py").unlink()
    with pytest.raises(FileNotFoundError, match="'xml'"):
        docstrings.load(library=library)


def test_hold_out_splits_by_file(data):
    split = docstrings.hold_out(data.train)
    assert len(split.train) + len(split.test) == len(data.train)
    assert not {d.file for d in split.train} & {d.file for d in split.test}
    assert 0.15 < len(split.test) / len(data.train) < 0.36
