"""What a result depends on, and the files that keep results."""

from __future__ import annotations

import csv
import datetime
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from harness import Result

import pyfused


def environment() -> dict[str, str]:
    """What a result depends on: processor, instruction set, threads, versions, commit; nothing names the machine."""
    info = pyfused.build_info()
    isa = info["cpu_capability"]
    return {
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "cpu": info["cpu"],
        "isa": isa + " (emulated)" if isa in info["cpu_capabilities_emulated"] else isa,
        # With AMX the base product in bf16 is several times faster, and all that comes on top weighs as much more.
        "amx": "yes" if torch.cpu.get_capabilities().get("amx_bf16") else "no",
        "threads": str(info["threads"]),
        **{name: str(info[name]) for name in ("python", "torch", "torch_cuda", "peft", "pyfused", "compiler")},
        "commit": _commit(),
    }


def vendor_limit(info: dict[str, str]) -> tuple[dict[str, str], str]:
    """``info`` with what oneDNN is held to, and a suffix for result files that says so.

    ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`` (with ``PYFUSED_CPU_CAPABILITY=AVX512_BF16``) makes a machine without AMX,
    ``AVX2`` (with ``PYFUSED_CPU_CAPABILITY=AVX2``, ``MKL_ENABLE_INSTRUCTIONS=AVX2``, ``ATEN_CPU_CAPABILITY=avx2``) one
    with AVX2 alone.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    if limit == "all":
        return info | {"onednn_max_cpu_isa": limit}, ""
    return info | {"onednn_max_cpu_isa": limit, "amx": "not used"}, f"-{limit.lower()}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # Results that an earlier run wrote, and what is written about them, do not change what is measured.
        ignored = (":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)README.md")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *ignored)
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PYFUSED_COMMIT", "unknown")  # a copy of the tree without its history


def result_name(op: str, info: Mapping[str, str]) -> str:
    """File name without suffix: op, kind of device, its name, instruction set and threads where it is a CPU."""
    if info["device"] != "cpu":
        return f"{op}-cuda-{_slug(info['device'])}"
    return f"{op}-cpu-{_slug(info['cpu'])}-{_slug(info['isa'])}-t{info['threads']}"


def _slug(text: str) -> str:
    text = re.sub(r"\((r|tm|c)\)|@.*|\b(cpu|processor)\b", " ", text.lower())
    return re.sub(r"[^a-z0-9_]+", "-", text).strip("-")


def write_csv(
    path: Path, info: Mapping[str, str], results: Sequence[Result], before: Sequence[Mapping[str, object]] = ()
) -> None:
    """A block of ``# key: value`` lines, then ``before`` and one row for each result: its case and the numbers."""
    rows = list(before)
    for result in results:
        row = {"label": result.case.label, **asdict(result.case), "mode": result.mode, "provider": result.provider}
        row |= {key: f"{value:.4f}" for key, value in asdict(result.stats).items()}
        row |= {"ratio_min": f"{result.ratio_min:.4f}", "ratio_p50": f"{result.ratio_p50:.4f}"}
        row |= {"samples": result.samples, "calls_per_sample": result.calls_per_sample}
        row["saved_bytes"] = "" if result.saved_bytes is None else result.saved_bytes
        rows.append(row | result.extra)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in info.items())
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The header block and the rows of a file that :func:`write_csv` wrote; all values are text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    return dict(header), list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def others(path: Path, info: dict[str, str], done: set[str]) -> list[dict[str, str]]:
    """Rows of other cases that an earlier part of the run wrote; a file of another commit or machine starts anew."""
    if not path.exists():
        return []
    header, rows = read_csv(path)
    return [row for row in rows if row["label"] not in done] if is_same_run(header, info) else []


def is_same_run(header: dict[str, str], info: dict[str, str]) -> bool:
    """Whether rows of one can stand beside rows of the other."""
    return all(header.get(key) == info.get(key) for key in ("commit", "cpu", "isa", "threads", "onednn_max_cpu_isa"))
