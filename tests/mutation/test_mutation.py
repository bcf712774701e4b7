"""The runner makes the change that it says, in a copy, and tells what a test notices from what none does."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.changes import Change, changes_of
from tests.mutation.cover import IMPORT, merged, shared, spread
from tests.mutation.run import SERVICE, STAGES, Drawn, Judge, draw, equivalents, report, stages
from tests.mutation.tests_of import Lines, files_of
from tests.mutation.tree import ROOT, Copy, fingerprint, modules

CASES = [
    ("a swapped comparison", "x = a < b", {"x = a <= b"}),
    ("a swapped comparison", "x = a not in b", {"x = a in b"}),
    ("a swapped comparison", "x = 0 <= a < n", {"x = 0 < a < n", "x = 0 <= a <= n"}),
    ("another operator", "x = a + b * c", {"x = (a - b * c)", "x = a + (b / c)"}),
    ("another operator", "x = 'a' + b", set()),
    ("another operator", "n += 2", {"n -= 2"}),
    ("an update left out", "n += 2", {"pass"}),
    ("an update left out", "loss = loss + penalty", {"pass"}),
    ("an update left out", "x[0] = 1", {"pass"}),
    ("an update left out", "x = 1", set()),
    ("a constant", "x = [3, True, 0.5]", {"x = [4, True, 0.5]", "x = [(2), True, 0.5]",
                                          "x = [3, False, 0.5]", "x = [3, True, 1.5]"}),
    ("a constant", "def f(n: Literal[3] = 2): pass", {"def f(n: Literal[3] = 3): pass",
                                                     "def f(n: Literal[3] = (1)): pass"}),
    ("or for and", "x = a and b and c", {"x = (a or b or c)"}),
    ("a negated condition", "x = not a", {"x = (a)"}),
    ("a negated condition", "if a:\n    b()", {"if not (a):\n    b()"}),
    ("a negated condition", "x = 1 if a else 2", {"x = 1 if (not (a)) else 2"}),
    ("another reduction", "x = y.mean(0)", {"x = y.sum(0)"}),
    ("another reduction", "x = any(y)", {"x = all(y)"}),
    ("another axis", "x = y.sum(-1)", {"x = y.sum(0)"}),
    ("another axis", "x = torch.stack(y, dim=0)", {"x = torch.stack(y, dim=1)"}),
    ("another axis", "x = max(y, 0)", set()),
    ("a raise left out", "raise InputError(f'{n + 1}')", {"pass"}),
    ("a call left out", "out.append(3)", {"pass"}),
    ("a call left out", "x = out.pop()", set()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "source", "wanted"), CASES)
def test_each_kind_makes_the_changes_it_says(kind: str, source: str, wanted: set[str]) -> None:
    found = {change.applied(source) for change in changes_of(source) if change.kind == kind}
    assert {ast.unparse(ast.parse(one)) for one in found} == {ast.unparse(ast.parse(one)) for one in wanted}


def test_what_does_nothing_is_left_alone() -> None:
    source = (
        '"""One + 1."""\nfrom __future__ import annotations\n__all__ = ["a"]\nif TYPE_CHECKING:\n    x = 1\n'
        "assert a < 3\nraise InputError(f'{1 + 2}') from None\nn: int\n"
    )
    assert {change.kind for change in changes_of(source)} == {"a raise left out"}


def test_every_change_of_the_tree_is_python_and_changes_its_own_lines_only() -> None:
    for path in modules()[::9]:
        source = (ROOT / path).read_text()
        tree = ast.dump(ast.parse(source))
        for change in changes_of(source)[::7]:
            new = change.applied(source)
            assert ast.dump(ast.parse(new)) != tree, change
            first, last = change.lines
            before, after = source.splitlines(), new.splitlines()
            assert after[: first - 1] == before[: first - 1]
            assert before[last:] == after[len(after) - (len(before) - last) :], change


def test_letters_of_several_bytes_do_not_move_a_change() -> None:
    source = 'x = "žluťoučký", n + 1'
    assert 'x = "žluťoučký", (n - 1)' in {change.applied(source) for change in changes_of(source)}
    with pytest.raises(ValueError, match="is not what it was"):
        changes_of(source)[0].applied("y = 2")


def small(folder: Path) -> Path:
    """A tree of one module with two functions, of which one is tested by value."""
    root = folder / "small"
    for name, text in {
        "mm_adapters/__init__.py": "",
        "mm_adapters/sums.py": "def total(x, y):\n    return x + y\n\n\ndef share(x, y):\n    return x / y\n",
        "tests/test_sums.py": (
            "from mm_adapters.sums import share, total\n\n\n"
            "def test_a_total():\n    assert total(2, 3) == 5\n\n\n"
            "def test_a_share():\n    assert share(2, 3)\n"
        ),
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = ['--import-mode=importlib']\n"
        "pythonpath = ['.']\nmarkers = ['slow: ', 'ndif: ']\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_changes_are_made_in_a_copy_and_judged_there(tmp_path: Path) -> None:
    root = small(tmp_path)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    judge = Judge(Copy(tmp_path / "copy", root), seconds=60)
    source = (root / "mm_adapters/sums.py").read_text()
    verdicts = {
        change.new: judge.verdict(Drawn("mm_adapters/sums.py", change), ["tests/test_sums.py"])
        for change in changes_of(source)
        if change.kind == "another operator"
    }
    assert verdicts == {"(x - y)": "noticed", "(x * y)": "survived"}
    nothing = Drawn("mm_adapters/sums.py", changes_of(source)[0])
    assert judge.verdict(nothing, []) == "no test"
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    copied = (judge.copy.root / "mm_adapters/sums.py").read_text()
    assert copied == source


def test_a_test_that_fails_anyway_notices_nothing_and_one_that_hangs_is_ended(tmp_path: Path) -> None:
    root = small(tmp_path)
    (root / "tests/test_bad.py").write_text("def test_bad():\n    assert False\n")
    (root / "tests/test_slow.py").write_text("import time\n\n\ndef test_slow():\n    time.sleep(60)\n")
    (root / "tests/test_waits.py").write_text(
        "from mm_adapters.sums import total\n\n\ndef test_waits():\n"
        "    while total(2, 3) != 5:\n        pass\n"
    )
    copy = Copy(tmp_path / "copy", root)
    one = Drawn("mm_adapters/sums.py", changes_of((root / "mm_adapters/sums.py").read_text())[0])
    assert Judge(copy, seconds=120).verdict(one, ["tests/test_bad.py"]) == "no sound test"
    assert Judge(copy, seconds=8).verdict(one, ["tests/test_slow.py"]) == "no sound test"
    assert Judge(copy, seconds=8).verdict(one, ["tests/test_waits.py"]) == "too slow"


def test_tests_run_in_turns_and_those_of_a_service_last() -> None:
    tests = [f"t.py::{i}" for i in range(80)]
    first, second = STAGES
    assert stages(tests) == [tests[:first], tests[first:second], tests[second:]]
    assert stages(tests[:7]) == [tests[:7]]
    assert stages([*tests[:7], SERVICE]) == [tests[:7], [SERVICE]]
    assert stages([SERVICE]) == [[SERVICE]]
    assert stages([]) == []


def test_a_seed_draws_the_same_changes_again_and_more_of_longer_modules() -> None:
    before = fingerprint()
    one, same, other = (draw(60, seed, modules()) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert len(set(one)) == 60
    assert fingerprint() == before
    paths = ["mm_adapters/sites/tower_view.py", "mm_adapters/families/llava.py"]
    drawn = [d.module for d in draw(12, 0, paths)]
    assert drawn.count(paths[0]) > drawn.count(paths[1])
    with pytest.raises(ValueError, match="fewer than 99999"):
        draw(99999, 0, paths)


def test_a_map_says_which_tests_run_a_line() -> None:
    tests = {
        "t.py::one[x]": {"seconds": 3.0, "fixtures": []},
        "t.py::one[y]": {"seconds": 1.0, "fixtures": ["model"]},
        "t.py::one[z]": {"seconds": 2.0, "fixtures": []},
        "t.py::one[w]": {"seconds": 4.0, "fixtures": []},
        "t.py::one[v]": {"seconds": 5.0, "fixtures": []},
        "t.py::one[u]": {"seconds": 6.0, "fixtures": []},
        "t.py::one[t]": {"seconds": 7.0, "fixtures": []},
        "t.py::two[a-b]": {"seconds": 9.0, "fixtures": ["model"]},
        "u.py::three": {"seconds": 1.0, "fixtures": ["model"]},
        "u.py::long": {"seconds": 500.0, "fixtures": []},
    }
    ran = {
        1: {IMPORT},
        5: {IMPORT, "t.py::failed", *(f"t.py::one[{letter}]" for letter in "tuvwxyz")},
        6: {"t.py::one[y]", "t.py::two[a-b]"},
        7: {shared("model", "t.py")},
        8: {"u.py::long", "u.py::three"},
        9: {"u.py::long"},
    }
    held = json.loads(json.dumps(merged(tests, {"a.py": ran})))
    lines = Lines(held["tests"], held["seconds"], held["lines"], held["at_import"])

    def at(first: int, last: int) -> list[str]:
        return lines.of("a.py", Change("", 0, 0, "", "", (first, last)))

    assert at(5, 5) == [f"t.py::one[{letter}]" for letter in "yzxwvu"]  # Of one function's cases six.
    assert at(6, 6) == ["t.py::one[y]", "t.py::two[a-b]"]
    assert at(7, 7) == ["t.py::one[y]", "t.py::two[a-b]"]  # Who asks for the fixture, in its file.
    assert at(8, 8) == ["u.py::three"]  # Within the time that one change may take,
    assert at(9, 9) == ["u.py::long"]  # but at least one.
    assert at(10, 12) == []
    others = [f"t.py::one[{letter}]" for letter in "zxwv"]  # Not the last: it would take too long.
    assert at(1, 1) == ["t.py::one[y]", "u.py::three", "t.py::two[a-b]", *others]
    assert spread([], {}) == []
    nearest = files_of("methods_multimodal/data_attribution/retrieval.py")
    assert nearest[0].startswith("tests/methods/data_attribution/")


def test_the_map_of_a_test_file_has_the_lines_that_its_tests_run(tmp_path: Path) -> None:
    out = tmp_path / "lines.json"
    name, module = "tests/methods/test_generators.py", "methods_multimodal/core/generators.py"
    command = [sys.executable, "-m", "tests.mutation.cover", "--out", str(out), "-n", "0", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = Lines.read(out)

    def ran_by(text: str) -> list[str]:
        at = (ROOT / module).read_text().splitlines().index(text) + 1
        return [t.rpartition("::")[2] for t in lines.of(module, Change("", 0, 0, "", "", (at, at)))]

    assert ran_by("    seed = 0") == ["test_several_numbers_are_digits_of_one_seed"]
    one_line = "    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)"
    assert ran_by(one_line) == ["test_a_seed_is_torchs_own_and_a_generator_is_itself"]


def test_equivalents_have_reasons_and_count_for_neither_side(tmp_path: Path) -> None:
    path = tmp_path / "equivalents.txt"
    path.write_text("# A comment\n\na.py  a constant: 1 -> 2  # a default that no number depends on\n")
    assert equivalents(path) == {"a.py  a constant: 1 -> 2": "a default that no number depends on"}
    assert all(equivalents().values())
    change = Change("a constant", 0, 1, "1", "2", (3, 3))
    one = Drawn("mm_adapters/store/a.py", change)
    assert one.key == "mm_adapters/store/a.py  a constant: 1 -> 2"
    text, good = report([(one, "noticed")] * 19 + [(one, "survived")] + [(one, "equivalent")] * 2)
    assert "95.0%  19 of 20 noticed, 2 equivalent" in text
    assert good
    for bad in (
        ["noticed"] * 18 + ["survived"],
        ["noticed"] * 9 + ["equivalent"] * 2,
        ["equivalent"],
        ["no test"],
    ):
        assert not report([(one, verdict) for verdict in bad])[1]
