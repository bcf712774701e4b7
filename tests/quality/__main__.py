"""Every table of quality, one after the other.

python -m tests.quality (--all | --only NAME ...) [--out FOLDER] [--quick]

Each is a command of its own too. What is printed is also written to FOLDER/NAME.md: `--out docs/tables` makes
those that the pages show. With `--quick` every table is made small, to see that it can be made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # The module and its arguments, then those that make it small.
    "segmentation": (("tests.quality.segmentation",), ("--images", "8", "--draws", "2")),
    "sae": (
        ("tests.quality.sae_table",),
        *(("--seeds", "2", "--draws", "2", "--scenes", "200", "--images", "400", "--steps", "30"),),
    ),
    "das": (("tests.quality.das",), ("--draws", "1", "--seeds", "1", "--steps", "2")),
    "probing": (("tests.quality.probing",), ("--n", "60", "--draws", "1", "--only", "tiny-clip-vision")),
    "probing-methods": (
        ("tests.quality.probing_methods",),
        ("--n", "60", "--draws", "1", "--only", "prompts"),
    ),
    "lenses": (("tests.quality.lenses",), ("--quick",)),
    "heads": (("tests.quality.heads",), ("--n", "40", "--draws", "1", "--seeds", "1")),
    "dissection": (("tests.quality.dissection",), ("--n", "40", "--draws", "1", "--seeds", "1")),
    "flow": (("tests.quality.flow",), ("--n", "4", "--traced", "4", "--draws", "1")),
    "neurons": (("tests.quality.neurons",), ("--n", "6", "--draws", "2", "--named", "4")),
    "circuits": (("tests.quality.circuits",), ("--only", "clip:text", "--score", "4", "--report", "4")),
    "attribution": (("tests.quality.attribution",), ("--sd", "1", "--llava", "2")),
    "words": (
        ("tests.quality.cross_attention",),
        *(
            (
                "--n",
                "2",
                "--validation",
                "2",
                "--causal",
                "1",
                "--pairs",
                "1",
                "--draws",
                "1",
                "--steps",
                "2",
            ),
        ),
    ),
}


def as_page(printed: str) -> str:
    """Tables in Markdown as they are, other text as it stands."""
    is_markdown = any(line.startswith("|") for line in printed.splitlines())
    return printed.strip() + "\n" if is_markdown else f"```text\n{printed.strip()}\n```\n"


def run(name: str, folder: Path | None, *, quick: bool) -> float:
    """Prints the table, keeps it if asked, and says how many seconds it took."""
    (module, *arguments), small = TABLES[name]
    began = time.monotonic()
    command = [sys.executable, "-m", module, *arguments, *(small if quick else ())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    spent_s = time.monotonic() - began
    sys.stdout.write(f"\n## {name} ({spent_s:.0f} s)\n\n{done.stdout}")
    sys.stdout.flush()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(as_page(done.stdout), "utf-8")
    if done.returncode not in (0, 1):  # 1: a bound was missed, which the table says.
        raise SystemExit(f"{name}: {' '.join(command)} ended with {done.returncode}")
    return spent_s


def main(argv: list[str] | None = None) -> None:
    """Prints the tables that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true")
    which.add_argument("--only", nargs="+", choices=tuple(TABLES), default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    spent_s = sum(run(name, options.out, quick=options.quick) for name in options.only or TABLES)
    sys.stdout.write(f"\nAll of it took {spent_s / 60:.0f} minutes.\n")


if __name__ == "__main__":
    main()
