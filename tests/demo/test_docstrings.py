"""The rules that make the demo's data set an honest one, on this Python's library and on small made-up ones."""

import hashlib
import platform
from collections import Counter
from pathlib import Path

import pytest

from pyfused.demo import docstrings
from pyfused.demo.docstrings import CANDIDATES, CLASSES, FOLDS, Dataset, Docstring


@pytest.fixture(scope="module")
def data() -> Dataset:
    return docstrings.load()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library in which each candidate has one file with just enough docstrings, all different."""
    for i, package in enumerate(CANDIDATES):
        write(
            tmp_path / package / "module.py",
            *(f"What is written as {j} in number {i} of them." for j in range(docstrings.MIN_DOCSTRINGS)),
        )
    return tmp_path


def write(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(texts)))


def counts(side: list[Docstring]) -> Counter:
    return Counter(docstring.label for docstring in side)


def test_every_package_is_on_both_sides(data):
    assert len(data.packages) == CLASSES
    for side, least in ((data.train, 30), (data.test, 15)):
        assert min(counts(side)[label] for label in range(CLASSES)) >= least


def test_packages_are_the_first_candidates_in_their_order(data):
    places = [CANDIDATES.index(package) for package in data.packages]
    assert places == sorted(set(places))


def test_sides_share_no_file(data):
    heldout = docstrings.heldout_files()
    assert not {docstring.file for docstring in data.train} & heldout
    assert {docstring.file for docstring in data.test} <= heldout


def test_no_text_twice(data):
    texts = Counter(docstring.text.casefold() for docstring in data.train + data.test)
    assert max(texts.values()) == 1


def test_no_name_of_a_candidate_is_left(data):
    for docstring in data.train + data.test:
        text = docstring.text.replace("[MASK]", "").casefold()
        assert not any(name in text for name in CANDIDATES), docstring


def test_label_is_the_package_of_the_file(data):
    for docstring in data.train + data.test:
        assert docstring.file.startswith(data.packages[docstring.label] + "/")
        assert not {"test", "tests", "idle_test"} & set(docstring.file.split("/")[:-1])


def test_sides_have_the_same_shares_of_the_classes(data):
    # Other Pythons have other files, and the list is fixed.
    train, test = counts(data.train), counts(data.test)
    for label in range(CLASSES):
        assert 0.2 < test[label] / (train[label] + test[label]) < 0.45


def test_list_of_heldout_files_has_all_candidates():
    files = docstrings.heldout_files()
    assert {file.partition("/")[0] for file in files} == set(CANDIDATES)
    lines = docstrings.HELDOUT_LIST.read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == sorted(files)


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the list is that of another Python's files")
def test_list_of_heldout_files_is_the_rule(data):
    chosen = docstrings.choose_heldout(data.train + data.test)
    assert chosen == {file for file in docstrings.heldout_files() if file.partition("/")[0] in data.packages}
    assert (len(data.train), len(data.test)) == (2209, 1110)  # as the module's docstring says


def made_up(**sizes: int) -> list[Docstring]:
    return [Docstring(f"{file} {i}", 0, f"{file}.py") for file, size in sizes.items() for i in range(size)]


def test_heldout_files_are_nearest_to_a_third():
    assert docstrings.choose_heldout(made_up(a=10, b=6, c=5)) == {"b.py"}  # 7 of 21: 6 is nearer than 5, 10, 11
    assert docstrings.choose_heldout(made_up(a=11, b=3, c=4)) == {"b.py", "c.py"}  # 6 of 18: 7 is nearer than 4
    assert docstrings.choose_heldout(made_up(a=5, b=3, c=1)) == {"b.py"}  # 3 of 9
    assert docstrings.choose_heldout(made_up(a=3, b=5, c=1000)) == {"a.py", "b.py"}


def test_heldout_files_are_taken_in_the_order_of_their_hashes():
    alike = made_up(a=2, b=2, c=2, d=2, e=2, f=2)
    order = sorted("abcdef", key=lambda file: hashlib.sha256(f"{file}.py".encode()).digest())
    assert docstrings.choose_heldout(alike) == {f"{file}.py" for file in order[:2]}
    assert docstrings.choose_heldout(alike[::-1]) == docstrings.choose_heldout(alike)
    assert len({docstrings.choose_heldout(alike, salt) for salt in FOLDS}) > 1


def test_mask_takes_names_in_any_case_and_within_words():
    masked = docstrings.mask_names("An HTTPServer for XML-RPC, not xmlrpc.client nor XmlReader; https, Emails.", "#")
    assert masked == "An #Server for #, not #.client nor #Reader; #s, #s."
    assert docstrings.mask_names("Tkinter in IDLE, idlelib, lib2to3 and 2to3.", "#") == "# in #, #, # and #."


def test_text_of_two_files_counts_once_where_it_is_first(library):
    same = "A text that stands in two files, one of them on the test side."
    write(library / "asyncio" / "tasks.py", same.upper())
    write(library / "email" / "new.py", same)
    data = docstrings.load(library=library)
    assert [d.file for d in data.train + data.test if d.text.casefold() == same.casefold()] == ["asyncio/tasks.py"]
    assert [d.file for d in data.test] == ["asyncio/tasks.py"]


def test_short_and_nested_docstrings_and_test_folders(library):
    (library / "logging" / "more.py").write_text(
        "class A:\n"
        '    """A class with words enough for it to be\n\n    taken."""\n'
        '    async def f(self):\n        """A coroutine with words enough for it to be taken."""\n'
        '    def g(self):\n        """Too short."""\n'
    )
    for folder in ("test", "tests", "idle_test"):
        write(library / "logging" / folder / "module.py", "A test's docstring, nothing of which is to be in the set.")
    texts = [d.text for d in docstrings.load(library=library).train if d.file.startswith("logging/")]
    assert texts[docstrings.MIN_DOCSTRINGS :] == [
        "A class with words enough for it to be taken.",
        "A coroutine with words enough for it to be taken.",
    ]


def test_missing_packages_are_made_up_for_by_the_next(library):
    write(library / "distutils" / "module.py", "A stub of a package, as some distributions leave one.")
    (library / "tkinter" / "module.py").unlink()
    packages = docstrings.load(library=library).packages
    assert packages == tuple(p for p in CANDIDATES if p not in ("tkinter", "distutils"))[:CLASSES]


def test_too_few_packages_are_an_error(library):
    for package in ("tkinter", "asyncio", "xml", "http", "xmlrpc"):
        (library / package / "module.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"11 of 16 packages.*tkinter, asyncio, xml, http, xmlrpc"):
        docstrings.load(library=library)


def test_hold_out_splits_the_training_side_by_file(data):
    seen = set()
    for salt in FOLDS:
        split = docstrings.hold_out(data, salt)
        assert sorted(split.train + split.test, key=repr) == sorted(data.train, key=repr)
        assert not {d.file for d in split.train} & {d.file for d in split.test}
        assert 0.2 < len(split.test) / len(data.train) < 0.36
        seen.add(frozenset(d.file for d in split.test))
    assert len(seen) == len(FOLDS)
