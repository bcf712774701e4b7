"""Fuzzes what is on disk: `python -m tests.fuzz.files --n 2000 --seed 1`.

Writes one of `stored.KINDS`, damages a file of it (bits, cuts, texts in another encoding, JSON without a key
or with a value that cannot be), reads it, and judges what comes: an error of the package's own classes,
or what was written. A tenth are left as they are, and must be read; a tenth are written onto a disk that is
full at some byte. `--only INDEX` does one of them alone. Ends with 1 if one was silent, ran code, left
a half-written file or was refused though whole, or if more than 2 % were another library's errors.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.outcome import own_classes as _own_classes
from tests.fuzz.stored import KINDS, Kind

MOST_FOREIGN = 0.02
SECONDS = 60
# Whose errors say what is wrong with a file of their format, and nothing else could.
_READERS = ("PIL", "yaml", "json", "struct", "zlib", "builtins")
_RUNS_CODE = (
    "os.system",
    "os.exec",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "os.spawn",
    "pty.spawn",
)


@dataclass(frozen=True)
class Verdict:
    """One case: what was done to which file, and what came of it."""

    index: int
    kind: str
    done: str
    outcome: str
    seen: str


class Watch:
    """Notes what Python does that reading a file may not: programs, sockets, files outside."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in _RUNS_CODE:
            self.seen.append(event)
        is_write = event == "open" and isinstance(args[1], str) and bool(set(args[1]) & set("wxa+"))
        at_folder = event in ("os.mkdir", "os.remove") and args[-1] != -1  # A name in a folder that is open.
        changes = event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
        if is_write or (changes and not at_folder):
            self._outside(event, args[0])

    def _outside(self, event: str, path: Any) -> None:
        with contextlib.suppress(TypeError, ValueError):
            place = Path(os.fspath(path)).resolve()
            allowed = place.is_relative_to(Path(self.inside or "/").resolve()) or str(place).startswith(
                "/dev/"
            )
            if not allowed and "__pycache__" not in str(place):
                self.seen.append(f"{event} {place}")


own_classes = cache(_own_classes)


def _flip(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]


def _exchange(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    n = rng.randrange(1, 40)
    return raw[:at] + rng.randbytes(len(raw[at : at + n])) + raw[at + n :]


ANY: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": _flip,
    "bytes exchanged": _exchange,
    "cut": lambda raw, rng: raw[: rng.randrange(len(raw))],
    "emptied": lambda raw, rng: b"",
    "longer": lambda raw, rng: raw + rng.randbytes(rng.randrange(1, 30)),
    "zeros": lambda raw, rng: bytes(len(raw)),
    "noise": lambda raw, rng: rng.randbytes(max(1, len(raw))),
}
# For files without a checksum: what cannot be meant.
PLAIN: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda raw, rng: b"",
    "zeros": lambda raw, rng: bytes(len(raw)),
    "noise": lambda raw, rng: b"\xff\xfe" + rng.randbytes(max(8, len(raw))),
    "UTF-16": lambda raw, rng: raw.decode("latin-1").encode("utf-16"),
    "UTF-16 without a mark": lambda raw, rng: raw.decode("latin-1").encode("utf-16-le"),
    "nested deep": lambda raw, rng: b"[" * 100_000 + b"]" * 100_000,
}
_HALF = {"cut in half": lambda raw, rng: raw[: len(raw) // 2]}
WRONG = (None, -5, 0, 1.5, "", "x", [], ["a"], {}, {"a": 1}, True, 10**30, float("nan"), "../../etc", "\0")


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from _places(inner, (*at, key))


def _edited(document: Any, rng: random.Random, spared: Sequence[str]) -> tuple[Any, str]:
    """JSON with a key gone, or a value of another kind."""
    places = [p for p in _places(document) if not set(map(str, p)) & set(spared)]
    place = rng.choice(places)
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    was = parent[place[-1]]
    if rng.random() < 0.35:
        del parent[place[-1]]
        return document, f"without {'.'.join(map(str, place))}"
    others = [w for w in WRONG if type(w) is not type(was) and not (w == 0 and was is False)]
    parent[place[-1]] = rng.choice(others)
    return document, f"{'.'.join(map(str, place))} {was!r} -> {parent[place[-1]]!r}"


@cache
def _written(kind: Kind) -> tuple[Path, Any]:
    folder = Path(tempfile.mkdtemp(prefix="mm-files-"))
    with _quiet():
        kind.write(folder)
        copy = folder.with_name(f"{folder.name}-read")
        shutil.copytree(folder, copy)
        value = kind.read(copy)
    shutil.rmtree(copy)
    return folder, value


def damage(kind: Kind, folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Damages a file of the folder; what was done, and whether it must be refused."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file = rng.choice(files)
    name, raw = str(file.relative_to(folder)), file.read_bytes()
    if rng.random() < 0.06:
        file.unlink()
        is_question = file.parent.name == "images" and kind.name in ("coco", "index maps")
        return f"{name}: gone", not kind.rewrites and not is_question
    if kind.sealed:
        if len(files) > 1 and rng.random() < 0.1:
            other = rng.choice([f for f in files if f != file])
            first, second = file.read_bytes(), other.read_bytes()
            file.write_bytes(second)
            other.write_bytes(first)
            return f"{name} and {other.relative_to(folder)} exchanged", False
        if file.suffix == ".json" and rng.random() < 0.5:
            document, done = _edited(json.loads(raw), rng, ())
            file.write_text(json.dumps(document))
            return f"{name}: {done}", False
        done, change = rng.choice(list(ANY.items()))
        file.write_bytes(change(raw, rng) if raw else b"x")
        return f"{name}: {done}", False
    is_picture = file.suffix == ".png"
    if file.suffix == ".json" and rng.random() < 0.7:
        # Of these, what a reader need not look at.
        spared = ("bbox", "area", "iscrowd", "supercategory", "metadata", "hook_name")
        optional = ("device", "apply_b_dec_to_input", "reshape_activations", "normalize_activations", "dtype",
                    "rescale_acts_by_decoder_norm", "architecture")  # fmt: skip
        document, done = _edited(json.loads(raw), rng, spared)
        file.write_text(json.dumps(document))
        lenient = (
            any(f"without {key}" in done for key in optional)
            or "legend" in name
            or "without annotations." in done
        )
        lenient = lenient or ("without segmentation" in done)
        return f"{name}: {done}", not (lenient or _may_be_meant(done))
    changes = {**PLAIN, **(_HALF if file.suffix in (".json", ".safetensors", ".png") else {})}
    done, change = rng.choice(list(changes.items()))
    file.write_bytes(change(raw, rng))
    meant = is_picture and done == "cut in half"  # Its lower half may be all that is gone, and gray.
    meant = meant or (file.suffix == ".txt" and done == "nested deep")  # Any line is a text.
    return f"{name}: {done}", not meant


def _may_be_meant(done: str) -> bool:
    """Edits that leave a file which says something else, but nothing wrong."""
    return (
        any(
            text in done
            for text in (
                "images.",
                "without categories.",
                "name 'circle'",
                "name 'red'",
                "segmentation.0.",
                "counts.",
                "file_name",
            )
        )
        and "->" not in done
    )


def judge(index: int, seed: int, watch: Watch) -> Verdict:
    """One case."""
    rng = random.Random(f"{seed} {index}")
    kind = rng.choice(KINDS)
    pristine, right = _written(kind)
    with tempfile.TemporaryDirectory(prefix="mm-files-") as top:
        folder = Path(top) / "case"
        shutil.copytree(pristine, folder)
        part = rng.random()
        if part < 0.1:
            return _on_a_full_disk(index, kind, Path(top) / "full", right, rng)
        done, must = ("nothing", False) if part < 0.2 else damage(kind, folder, rng)
        watch.inside, watch.seen[:] = Path(top), []
        value, error = _read(kind, folder)
        watch.inside = None
        if watch.seen:
            return Verdict(index, kind.name, done, "code", "; ".join(watch.seen)[:200])
    if error is None:
        if value != right:
            must_see = must or kind.sealed
            return Verdict(index, kind.name, done, "silent" if must_see else "read", f"{str(value)[:120]}")
        return Verdict(index, kind.name, done, "silent" if must else "right", "")
    seen = f"{type(error).__name__}: {' '.join(str(error).split())[:220]}"
    if done == "nothing":
        return Verdict(index, kind.name, done, "refused though whole", seen)
    foreign = _foreign(error)
    if not isinstance(error, own_classes()) or foreign:
        return Verdict(index, kind.name, done, "foreign", f"{seen} {foreign}")
    return Verdict(index, kind.name, done, "refused", seen)


def _read(kind: Kind, folder: Path) -> tuple[Any, BaseException | None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with _quiet():
            return kind.read(folder), None
    except Exception as error:  # noqa: BLE001  Whatever it is, it is judged.
        return None, error
    finally:
        signal.alarm(0)


def _on_a_full_disk(index: int, kind: Kind, folder: Path, right: Any, rng: random.Random) -> Verdict:
    """Writes where no file may grow beyond some size: what has its final name afterwards is whole."""
    folder.mkdir()
    most = rng.randrange(1, 4000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    error: BaseException | None = None
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        with _quiet():
            kind.write(folder)
    except Exception as raised:  # noqa: BLE001
        error = raised
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    done = f"written where a file ends at {most}"
    if not kind.sealed:  # Which the test writes itself.
        return Verdict(index, kind.name, done, "right", "")
    if error is not None and not isinstance(error, own_classes()):
        return Verdict(index, kind.name, done, "foreign", f"{type(error).__name__}: {error}"[:200])
    halves = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not _is_whole(p)]
    if halves:
        return Verdict(index, kind.name, done, "half-written", ", ".join(halves))
    return Verdict(index, kind.name, done, "refused" if error else "right", str(error or "")[:100])


def _is_whole(path: Path) -> bool:
    from mm_adapters.store import load_tensors, read_document

    if path.suffix == ".tmp" or path.name.startswith(".part-"):
        return path.suffix == ".tmp"  # Of a store's open shard; else nothing is left over.
    try:
        if path.suffix == ".safetensors":
            load_tensors(path)
        elif path.suffix == ".json":
            read_document(path, edited=True)
    except own_classes():
        return False
    return True


def _foreign(error: BaseException) -> str:
    """Another library's error that this one was made of."""
    inner = error.__cause__ or error.__context__
    seen: list[BaseException] = []
    while inner is not None and inner not in seen:
        seen.append(inner)
        module = type(inner).__module__.partition(".")[0]
        if not isinstance(inner, own_classes()):
            frames, trace = [], inner.__traceback__
            while trace is not None:
                frames.append(trace.tb_frame.f_code.co_filename)
                trace = trace.tb_next
            where = frames[-1] if frames else ""
            theirs = "site-packages" in where and not any(f"/{r}/" in where for r in ("PIL", "yaml"))
            if module not in _READERS or theirs:
                return f"(of {type(inner).__module__}.{type(inner).__name__})"
        inner = inner.__cause__ or inner.__context__
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def run(n: int, seed: int, only: int | None = None) -> list[Verdict]:
    """So many cases, one after the other."""
    torch.set_num_threads(1)
    watch = Watch()
    verdicts: list[Verdict] = []
    try:
        for i in range(n) if only is None else [only]:
            verdicts.append(judge(i, seed, watch))
            v = verdicts[-1]
            if v.outcome not in ("right", "refused", "read") or only is not None:
                print(f"{v.outcome}: {v.index} {v.kind}: {v.done}\n    {v.seen}", flush=True)
        return verdicts
    finally:
        watch.inside = None
        for kind in KINDS:
            with contextlib.suppress(Exception):
                shutil.rmtree(_written(kind)[0])
        _written.cache_clear()


def holds(verdicts: Sequence[Verdict]) -> bool:
    """Whether nothing was silent, ran code, was left half or refused though whole, and few were foreign."""
    counts = collections.Counter(v.outcome for v in verdicts)
    broken = sum(counts[name] for name in ("silent", "code", "half-written", "refused though whole"))
    return broken == 0 and counts["foreign"] <= MOST_FOREIGN * len(verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None)
    options = parser.parse_args(argv)
    verdicts = run(options.n, options.seed, options.only)
    table = collections.Counter((v.kind, v.outcome) for v in verdicts)
    for name in [k.name for k in KINDS]:
        print(f"{name:<14}", {o: n for (k, o), n in sorted(table.items()) if k == name})
    print("all           ", dict(collections.Counter(v.outcome for v in verdicts)))
    return int(not holds(verdicts))


if __name__ == "__main__":
    sys.exit(main())
