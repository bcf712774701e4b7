"""A store loses nothing it has promised, and gives back what was put in."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mm_adapters import StoreError
from mm_adapters.store import Column, Store, Writer, atomic_write

COLUMNS = {"site": Column((6,), torch.float16), "label": Column((), torch.int64)}
ABOUT = {"model": "tiny", "steps": [0, 1], "seed": 3}
SMALL = 200  # Bytes: some three appends of five rows a shard.


def append_number(i: int, n_rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return {
        "site": torch.randn(n_rows, 6, generator=generator),
        "label": torch.arange(i * n_rows, (i + 1) * n_rows),
    }


def fill(folder: Path, n: int = 8, stop: int | None = None, shard_bytes: int = SMALL) -> int:
    """Appends what is missing; with `stop`, dies at that append. Returns where it began."""
    with Writer(folder, COLUMNS, ABOUT, shard_bytes=shard_bytes) as writer:
        begun = writer.appends
        for i in range(begun, n):
            if i == stop:
                raise InterruptedError
            writer.append(append_number(i), items=2)
    return begun


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.bool])
def test_what_is_appended_comes_back_in_order(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = [torch.randint(0, 2, (n, 2, 3)).to(dtype) for n in (4, 1, 7)]
    with Writer(tmp_path / "s", {"x": Column((2, 3), dtype)}, shard_bytes=40) as writer:
        for part in parts:
            writer.append({"x": part})
    store = Store(tmp_path / "s")
    assert len(store) == 12
    assert store.rows()["x"].dtype == dtype
    assert torch.equal(store.rows()["x"], torch.cat(parts))
    assert torch.equal(store.rows(3, 9)["x"], torch.cat(parts)[3:9])


def test_views_are_every_row_in_order_and_lie_where_the_disk_is_mapped(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    store = Store(tmp_path / "s")
    parts = list(store.views(4, ["site"]))
    assert torch.equal(torch.cat([part["site"] for part in parts]), store.rows()["site"])
    assert max(len(part["site"]) for part in parts) == 4
    at = 0
    for part in parts:  # A copy would lie elsewhere.
        assert part["site"].data_ptr() == store.rows(at, at + 1)["site"].data_ptr()
        at += len(part["site"])
    with pytest.raises(StoreError, match="at least one row"):
        next(store.views(0))


def test_any_reader_of_safetensors_reads_a_shard(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    first = load_file(tmp_path / "s" / "000000-00.safetensors")
    assert torch.equal(first["site"], Store(tmp_path / "s").rows(0, len(first["site"]))["site"])


def test_writing_into_a_row_does_not_reach_the_disk(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    before = contents(tmp_path / "s")
    Store(tmp_path / "s").rows(0, 3)["site"].zero_()
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_store_is_the_same_byte_for_byte(tmp_path: Path, stop: int) -> None:
    fill(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fill(tmp_path / "cut", stop=stop)
    safe = Store(tmp_path / "cut", partial=True).rows()["label"].tolist()
    assert safe == list(range(len(safe)))
    assert fill(tmp_path / "cut") == stop  # An error loses nothing, though a shard was open.
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def _write_slowly(folder: Path, begun: Any) -> None:
    with Writer(folder, COLUMNS, ABOUT, shard_bytes=2000) as writer:
        begun.set()
        for i in range(writer.appends, 90):
            writer.append(append_number(i, 40))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_kill_9_at_any_moment_loses_nothing_that_was_promised(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    folder = tmp_path / "killed"
    rows = []
    for n_shards in (0, 1, 4, 9, 15):
        begun = fork.Event()
        process = fork.Process(target=_write_slowly, args=(folder, begun))
        process.start()
        begun.wait()
        while process.is_alive() and len(Store(folder, partial=True)) < 120 * n_shards:
            time.sleep(0.001)
        process.kill()
        process.join()
        store = Store(folder, partial=True)
        assert store.rows()["label"].tolist() == list(range(len(store)))
        rows.append(len(store))
    assert rows == sorted(rows)
    assert rows[-1] > 0
    _write_slowly(folder, fork.Event())
    _write_slowly(tmp_path / "whole", fork.Event())
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_writer_says_how_many_items_are_stored(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        fill(tmp_path / "s", stop=7)
    writer = Writer(tmp_path / "s", COLUMNS, ABOUT, shard_bytes=SMALL)
    assert writer.items == 2 * writer.appends == 2 * 7
    assert writer.rows == 35


def test_rows_of_an_open_shard_survive_kill_9(tmp_path: Path) -> None:
    """Far from the end of a shard, what was stored a while ago is there, and the bytes end up the same."""
    fork = multiprocessing.get_context("fork")

    def write(folder: Path, stop: int, pause_s: float = 0.0) -> int:
        with Writer(folder, COLUMNS, ABOUT) as writer:
            begun = writer.appends
            for i in range(begun, 40):
                if i == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                writer.append(append_number(i))
                time.sleep(pause_s)
        return begun

    process = fork.Process(target=write, args=(tmp_path / "s", 30, 0.04))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 8 <= write(tmp_path / "s", -1) <= 30
    write(tmp_path / "whole", -1)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", ["nothing", "part", "other"])
def test_an_open_shard_that_is_damaged_is_made_again(tmp_path: Path, left: str) -> None:
    fill(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fill(tmp_path / "s", stop=5)
    (open_file,) = (tmp_path / "s").glob("*-00.tmp")
    raw = open_file.read_bytes()
    if left == "nothing":
        open_file.unlink()
    else:
        open_file.write_bytes(raw[:-9] if left == "part" else raw[:-9] + bytes(9))
    assert fill(tmp_path / "s") == 4
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_run_that_died_while_a_shard_was_closing_goes_on(tmp_path: Path) -> None:
    """One of its files has its name already, and the manifest does not count it."""
    fill(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fill(tmp_path / "s", stop=5)
    for renamed in (tmp_path / "s").glob("*-00.tmp"):
        renamed.rename(renamed.with_suffix(".safetensors"))
    assert fill(tmp_path / "s") == 5
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_shards_that_changed_places_or_a_bit_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    one, two = (tmp_path / "s" / f"00000{i}-00.safetensors" for i in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(StoreError, match=r"000000-00\.safetensors is damaged"):
        Store(tmp_path / "s").rows(0, 1)
    one.write_bytes(first[:-1] + bytes([first[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"000000-00\.safetensors is damaged"):
        next(Store(tmp_path / "s").batches(4))


@pytest.mark.parametrize("how", ["cut", "overwritten", "gone"])
def test_a_shard_that_changes_under_an_open_store_is_an_error(tmp_path: Path, how: str) -> None:
    with Writer(tmp_path / "s", {"x": Column((2,))}) as writer:
        writer.append({"x": torch.ones(100_000, 2)})
    store = Store(tmp_path / "s")
    assert store.rows(0, 5)["x"].sum() == 10
    (shard,) = (tmp_path / "s").glob("*.safetensors")
    if how == "cut":
        os.truncate(shard, 200)
    elif how == "gone":
        shard.unlink()
    else:
        raw = shard.read_bytes()
        time.sleep(0.01)
        shard.write_bytes(raw[:-8] + bytes(8))
    with pytest.raises(StoreError, match="was changed while its store was open"):
        store.rows(99_000)


def test_a_manifest_that_is_not_as_it_was_written_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    for change in (
        lambda d: d["shards"][0].pop("items"),
        lambda d: d["shards"][0].update(rows=4),
        lambda d: d["about"].update(seed=4),
        lambda d: d.pop("crc32"),
    ):
        text = manifest.read_text()
        document = json.loads(text)
        change(document)
        manifest.write_text(json.dumps(document))
        with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
            Store(tmp_path / "s")
        manifest.write_text(text)
    manifest.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(StoreError, match=r"manifest\.json is not valid JSON"):
        Store(tmp_path / "s")


def test_more_shards_than_open_files_are_read(tmp_path: Path) -> None:
    with Writer(tmp_path / "s", {"x": Column(())}, shard_bytes=4) as writer:
        for i in range(80):
            writer.append({"x": torch.tensor([float(i)])})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    try:
        assert Store(tmp_path / "s").rows()["x"].tolist() == list(range(80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_disk_that_takes_no_more_is_one_clear_error_and_the_store_goes_on(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the same OSError at the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    columns = {"x": Column((1000,))}
    folder = tmp_path / "s"
    try:
        with Writer(folder, columns, shard_bytes=8000) as writer:
            writer.append({"x": torch.ones(2, 1000)})
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
            with pytest.raises(StoreError, match=r"could not be written: File too large\. 2 rows of 1 items"):
                writer.append({"x": torch.ones(2, 1000)})
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            writer.append({"x": torch.full((2, 1000), 2.0)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert Store(folder).rows()["x"][:, 0].tolist() == [1, 1, 2, 2]


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    shard = tmp_path / "s" / "000001-00.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(StoreError, match=r"000001-00\.safetensors is cut short"):
        Store(tmp_path / "s")


def test_a_missing_or_foreign_shard_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    shard = tmp_path / "s" / "000001-00.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(StoreError, match=r"no file .*000001-00"):
        Store(tmp_path / "s")
    shard.write_bytes(whole.replace(b'"F16"', b'"I16"'))
    with pytest.raises(StoreError, match="It is of another store"):
        Store(tmp_path / "s")


def test_a_store_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    with pytest.raises(StoreError, match=r"seed differ \(seed: there 3, asked for 4"):
        Writer(tmp_path / "s", COLUMNS, ABOUT | {"seed": 4}, shard_bytes=SMALL)
    with pytest.raises(StoreError, match="columns differ"):
        Writer(tmp_path / "s", {"site": Column((7,))}, ABOUT, shard_bytes=SMALL)


def test_what_does_not_fit_is_refused_and_the_rest_stands(tmp_path: Path) -> None:
    with Writer(tmp_path / "s", COLUMNS, ABOUT) as writer:
        good = append_number(0)
        for wrong, message in [
            ({"site": good["site"]}, "was given the columns"),
            (good | {"site": torch.zeros(5, 7)}, r"shape \(6,\), not \(7,\)"),
            (good | {"site": torch.zeros(4, 6)}, "unequal length"),
            (good | {"site": torch.zeros(5, 6, dtype=torch.int64)}, "Convert it"),
            (good | {"site": torch.full((5, 6), 7e4)}, "more than torch.float16 holds"),
        ]:
            with pytest.raises(StoreError, match=message):
                writer.append(wrong)
        writer.append(good)
    assert len(Store(tmp_path / "s")) == 5
    with pytest.raises(StoreError, match="is complete"):
        Writer(tmp_path / "s", COLUMNS, ABOUT).append(good)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = Writer(tmp_path / "s", COLUMNS, ABOUT)
    with pytest.raises(StoreError, match="Another process"):
        Writer(tmp_path / "s", COLUMNS, ABOUT)
    first.close()
    with pytest.raises(StoreError, match="no store"):
        Store(tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files"):
        Writer(tmp_path, COLUMNS, ABOUT)


def test_an_unfinished_store_is_opened_on_request(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        fill(tmp_path / "s", stop=7)
    with pytest.raises(StoreError, match="not complete"):
        Store(tmp_path / "s")
    assert len(Store(tmp_path / "s", partial=True)) == 30


def shuffled(folder: Path, **options: int) -> list[torch.Tensor]:
    store = Store(folder)
    return [b["label"] for b in store.batches(7, buffer_rows=24, block_rows=4, **options)]


def test_shuffled_batches_hold_every_row_once_and_columns_stay_together(tmp_path: Path) -> None:
    fill(tmp_path / "s", 20)
    whole = Store(tmp_path / "s").rows()
    labels = torch.cat(shuffled(tmp_path / "s"))
    assert labels.tolist() != sorted(labels.tolist())
    assert sorted(labels.tolist()) == list(range(100))
    for batch in Store(tmp_path / "s").batches(7, buffer_rows=24, block_rows=4):
        assert torch.equal(batch["site"], whole["site"][batch["label"]])


def labelled(folder: Path, n_rows: int) -> Store:
    with Writer(folder, {"label": Column((), torch.int64)}) as writer:
        writer.append({"label": torch.arange(n_rows)})
    return Store(folder)


@pytest.mark.parametrize("buffer_rows", [1, 4, 12, 13, 1000])
def test_a_windows_rows_are_whole_blocks_from_all_over_and_are_mixed(
    tmp_path: Path, buffer_rows: int
) -> None:
    store = labelled(tmp_path / "s", 60)  # Fifteen blocks of four.
    options = {"seed": 3, "buffer_rows": buffer_rows, "block_rows": 4}
    rows = [batch["label"] for batch in store.batches(2, **options)]
    every = torch.cat(rows)
    assert sorted(every.tolist()) == list(range(60))
    blocks = every // 4
    per_window = max(1, buffer_rows // 4)
    for window in blocks.split(4 * per_window):
        assert len(window.unique()) == len(window) // 4
    together = [len(set((batch // 4).tolist())) for batch in rows]
    if per_window == 1:
        assert together == [1] * 30
        assert blocks.unique_consecutive().tolist() != sorted(blocks.unique().tolist())
    else:
        assert sum(n > 1 for n in together) > 15
    if buffer_rows == 1000:  # Neighbours are parted, and where a row comes says nothing of its number.
        assert int((every.diff().abs() == 1).sum()) < 8
        places = torch.arange(60.0)
        assert abs(float(torch.corrcoef(torch.stack([places, every.float()]))[0, 1])) < 0.4


def test_rows_that_there_are_none_of_are_refused(tmp_path: Path) -> None:
    store = labelled(tmp_path / "s", 11)
    assert store.rows(9, 99)["label"].tolist() == [9, 10]
    assert store.rows(4, 4)["label"].tolist() == []
    assert store.rows(11)["label"].tolist() == []
    for start, stop in ((-1, 3), (5, 4), (12, None), (12, 20)):
        with pytest.raises(StoreError, match=f"no rows {start} to"):
            store.rows(start, stop)


@pytest.mark.parametrize("n_rows", [1, 9, 58])
def test_a_short_last_block_is_read_whole(tmp_path: Path, n_rows: int) -> None:
    store = labelled(tmp_path / "s", n_rows)
    for buffer_rows in (2, 8, 100):
        rows = [b["label"] for b in store.batches(3, seed=0, buffer_rows=buffer_rows, block_rows=4)]
        assert sorted(torch.cat(rows).tolist()) == list(range(n_rows))


def test_the_last_batch_may_be_dropped_in_either_order(tmp_path: Path) -> None:
    store = labelled(tmp_path / "s", 11)
    for seed in (None, 1):
        sizes = [len(batch["label"]) for batch in store.batches(4, seed=seed)]
        assert sizes == [4, 4, 3]
        kept = [len(batch["label"]) for batch in store.batches(4, seed=seed, drop_last=True)]
        assert kept == [4, 4]
    assert [len(batch["label"]) for batch in store.batches(11, seed=None, drop_last=True)] == [11]


@pytest.mark.parametrize("wrong", [{"size": 0}, {"buffer_rows": 0}, {"block_rows": 0}, {"start": -1}])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    store = labelled(tmp_path / "s", 11)
    with pytest.raises(StoreError, match=next(iter(wrong)).split("_")[0]):
        list(store.batches(**({"size": 2} | wrong)))


def test_a_seed_and_an_epoch_fix_the_order_and_any_batch_can_be_the_first(tmp_path: Path) -> None:
    fill(tmp_path / "s", 20)
    folder = tmp_path / "s"
    once = shuffled(folder, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(once, shuffled(folder, seed=5), strict=True))
    assert not torch.equal(torch.cat(once), torch.cat(shuffled(folder, seed=6)))
    assert not torch.equal(torch.cat(once), torch.cat(shuffled(folder, seed=5, epoch=1)))
    for start in range(len(once)):
        left = shuffled(folder, seed=5, start=start)
        assert len(left) == len(once) - start
        assert all(torch.equal(a, b) for a, b in zip(left, once[start:], strict=True))


def _own_memory_kib() -> int:
    """What the process holds that is not a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted as Linux does")
def test_reading_keeps_a_buffer_and_no_more(tmp_path: Path) -> None:
    with Writer(tmp_path / "s", {"x": Column((256,))}, shard_bytes=2**22) as writer:
        for _ in range(64):
            writer.append({"x": torch.ones(1024, 256)})
    store = Store(tmp_path / "s")
    peaks = []
    before = _own_memory_kib()
    for batch in store.batches(256, buffer_rows=2048):
        assert batch["x"].sum() == batch["x"].numel()
        peaks.append(_own_memory_kib() - before)
    assert len(peaks) == 256
    assert max(peaks) < 16 * 1024  # The store has 64 MiB, a buffer two.


def test_an_atomic_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "a"
    for number in ("1", "2"):
        with atomic_write(file) as draft:
            draft.write_text(number)
        with atomic_write(folder) as draft:
            draft.mkdir()
            (draft / number).write_text(number)

    def write_half(path: Path) -> None:
        with atomic_write(path) as draft:
            draft.mkdir() if path.is_dir() else draft.write_text("3")
            raise InterruptedError

    for path in (file, folder):
        with pytest.raises(InterruptedError):
            write_half(path)
    assert file.read_text() == "2"
    assert [p.name for p in folder.iterdir()] == ["2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.txt"]
