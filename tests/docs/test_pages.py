"""The documentation is true where that can be checked: its code runs and prints what the page says, its links lead
somewhere, its commands exist, and its tables are those of the result files.

A page is one program: its ``python`` blocks run in their order with one set of names, in an empty folder. A ``text``
block right after one is what it prints.
"""

from __future__ import annotations

import ast
import csv
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pyfused import BottleneckConfig, weighted
from pyfused.config import lora
from pyfused.nn import arguments

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "docs" / "methods", ROOT / "csrc", ROOT / "benchmarks")
PAGES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Rows of README.md's benchmark table and the cases that they are; the figure is the minimum over the frozen layer's.
BENCHMARK_ROWS = {
    "768 x 768, r = 8, fp32": "train bert-768 M=512 r=8 fp32 p=0.1",
    "768 x 768, r = 8, bf16": "train bert-768 M=512 r=8 bf16 p=0.1",
    "768 x 768, r = 8, bf16, adapter fp32": "train bert-768 M=512 r=8 bf16+fp32 p=0.1",
    "2048 x 2048, r = 16, fp32": "train llama-2048 M=512 r=16 fp32 p=0.1",
    "2048 x 2048, r = 16, bf16": "train llama-2048 M=512 r=16 bf16 p=0.1",
    "2048 x 2048, r = 16, bf16, adapter fp32": "train llama-2048 M=512 r=16 bf16+fp32 p=0.1",
}
BENCHMARK_COLUMNS = ("pyfused", "eager", "compile", "peft")


@dataclass(frozen=True)
class Block:
    """A block of code, the line before its first, and what the page says that it prints (None: nothing is said)."""

    code: str
    line: int
    output: str | None


def python_blocks(text: str) -> list[Block]:
    fences = list(FENCE.finditer(text))
    blocks = []
    for i, fence in enumerate(fences):
        if fence[1] != "python":
            continue
        after = fences[i + 1] if i + 1 < len(fences) else None
        shown = after and after[1] == "text" and not text[fence.end() : after.start()].strip()
        blocks.append(Block(fence[2], text.count("\n", 0, fence.start(2)), after[2] if shown else None))
    return blocks


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", read(page))


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(read(page))])
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for block in python_blocks(read(page)):
        exec(compile("\n" * block.line + block.code, ROOT / page, "exec"), names)
        printed = capsys.readouterr().out
        if block.output is not None:
            assert printed == block.output, f"{page}, line {block.line}"


def test_the_pages_that_teach_have_code():
    """Blocks that are not found would pass the test above."""
    for page in ("README.md", "docs/guide.md"):
        fences = read(page).count("```python")
        assert fences >= 3 and len(python_blocks(read(page))) == fences, page


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/methods/")])
def test_a_methods_page_says_when_to_use_it_and_what_it_costs(page):
    assert "**When to use it" in prose(page) and re.search(r"(\*\*|## )What it costs", prose(page))
    assert python_blocks(read(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    targets = re.search(r"^\.PHONY: (.+)$", read("Makefile"), re.MULTILINE)[1].split()
    shell = "".join(fence[2] for fence in FENCE.finditer(read(page)) if fence[1] == "sh")
    commands = re.findall(r"^make ([\w-]+)", shell, re.MULTILINE) + re.findall(r"`make ([\w-]+)`", prose(page))
    assert set(commands) <= set(targets), page


def messages_of_what_is_not_built() -> dict[str, str]:
    """Where pyfused makes a NotImplementedError, and its message with … for what is put in."""
    found = {}
    for path in sorted((ROOT / "pyfused").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "NotImplementedError":
                (text,) = node.args
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                message = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)
                found[f"{path.relative_to(ROOT)}, line {node.lineno}"] = message
    return found


def test_limits_has_one_row_for_each_not_implemented_error():
    parts = re.findall(r"^\| `([^`]+)` \|", prose("docs/limits.md"), re.MULTILINE)
    rows = [re.compile(re.escape(part).replace("…", ".+")) for part in parts]
    messages = messages_of_what_is_not_built()
    assert len(messages) > 30
    for where, message in messages.items():
        assert sum(bool(row.search(message)) for row in rows) == 1, f"{where}: {message}"
    for part, row in zip(parts, rows, strict=True):
        assert any(map(row.search, messages.values())), part


def test_limits_names_the_values_that_are_not_built():
    fields = (*lora._NOT_BUILT, *BottleneckConfig._not_built, *weighted._NOT_BUILT, *arguments._KNOWN_INITS)
    text = prose("docs/limits.md")
    assert [name for name in fields if not re.search(rf"`\"?{name}\"?`", text)] == []


def tables(section: str) -> list[list[str]]:
    """The lines of each table in a section of README.md."""
    text = read("README.md").split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [found.splitlines() for found in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)]


def test_benchmark_table_is_the_result_file():
    got = tables("Measured")[0][2:]
    (name,) = set(re.findall(r"\((benchmarks/results/lora-cpu-[^)]*\.csv)\)", read("README.md")))
    with (ROOT / name).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("# ")))
    ratios = {(row["label"], row["provider"]): float(row["ratio_min"]) for row in rows if row["mode"] == "full"}
    expected = [
        f"| {' | '.join([title, *(f'{ratios[label, provider]:.2f}' for provider in BENCHMARK_COLUMNS)])} |"
        for title, label in BENCHMARK_ROWS.items()
    ]
    assert got == expected, "the rows must be:\n" + "\n".join(expected)


def test_demo_tables_are_the_result_file():
    (name,) = set(re.findall(r"\((benchmarks/results/demo-[^)]*\.md)\)", read("README.md")))
    quality, cost = tables("The demo")
    assert "\n".join(quality) in read(name) and "\n".join(cost) in read(name)
