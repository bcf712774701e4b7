"""Kills long jobs at random moments and starts them again: nothing is lost, and the result is the same.

    python -m tests.fuzz.kills [--n 100] [--seed 0] [--job NAME ...]

A job is killed by SIGKILL once it has done so much of its work, drawn at random, and started again. Work is
counted in rows or steps. Printed for each job: how many kills, how often the result differed from that of
a run without a stop (byte for byte), and how much work was done in all beside what was needed. The exit
status is 1 if a result differed, or a job did more than 1.1 of its work over all of its kills.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.fuzz.jobs import BY_NAME, JOBS, Job, Setting, _model, pictures

LIMIT = 1.1  # Work done over work needed, over all kills of a job.
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """One kill: after how much work, how much was done in both runs, whether the results are the same."""

    at: int
    done: int
    needed: int
    same: bool
    went_on: bool

    @property
    def ratio(self) -> float:
        """Work done over work needed."""
        return self.done / self.needed


def _start(job: Job, setting: Setting, log: Path, stop: int | None, failed: Path) -> None:
    """The job in this process, its work noted in `log`; killed at so much work."""
    torch.set_num_threads(1)
    noted = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    done = 0

    def count(n: int) -> None:
        nonlocal done
        os.write(noted, f"{n}\n".encode())
        done += n
        if stop is not None and done >= stop:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            setting.folder.mkdir(parents=True, exist_ok=True)
            job.run(setting, count)
    except BaseException as error:  # noqa: BLE001  Whatever it is, the parent tells.
        failed.write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def run(job: Job, setting: Setting, log: Path, stop: int | None = None) -> int:
    """Runs the job in a process of its own; how much work it did. Raises: RuntimeError if it failed."""
    failed = log.with_suffix(".failed")
    process = _FORK.Process(target=_start, args=(job, setting, log, stop, failed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Forking with threads: torch has one here.
        process.start()
    process.join()
    if failed.exists():
        raise RuntimeError(f"{job.name}: {failed.read_text()}")
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def kill(job: Job, top: Path, data: Path, whole: dict[str, bytes], needed: int, at: int) -> Outcome:
    """One kill after so much work, and the run that goes on."""
    setting = Setting(top / f"{job.name}-{at}", data)
    run(job, setting, top / f"{job.name}-{at}.first", at)
    went_on = True
    try:
        run(job, setting, top / f"{job.name}-{at}.second")
    except RuntimeError as error:
        print(error, flush=True)
        went_on = False
    logs = [top / f"{job.name}-{at}.{part}" for part in ("first", "second")]
    done = sum(int(n) for log in logs if log.exists() for n in log.read_text().split())
    return Outcome(at, done, needed, job.artefact(setting.folder) == whole, went_on)


def kills(job: Job, n: int, rng: random.Random, top: Path) -> list[Outcome]:
    """So many kills of one job."""
    data = top / "pictures"
    if not data.exists():
        pictures(data)
    for name in ("tiny-clip", "tiny-llava", "tiny-sd"):
        _model(name, False)  # Loaded once, for all the processes to come.
    setting = Setting(top / f"{job.name}-whole", data)
    needed = run(job, setting, top / f"{job.name}-whole.log")
    whole = job.artefact(setting.folder)
    assert whole, f"{job.name} left nothing"
    ats = rng.sample(range(1, needed), min(n, needed - 1))
    return [kill(job, top, data, whole, needed, at) for at in ats]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="Kills in all.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", nargs="*", default=[job.name for job in JOBS])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    wrong = over = 0
    with tempfile.TemporaryDirectory() as top:
        for name in options.job:
            outcomes = kills(BY_NAME[name], -(-options.n // len(options.job)), rng, Path(top))
            other = sum(not o.same for o in outcomes)
            stuck = sum(not o.went_on for o in outcomes)
            ratios = [o.ratio for o in outcomes]
            total = sum(o.done for o in outcomes) / sum(o.needed for o in outcomes)
            over += total > LIMIT
            wrong += other + stuck
            print(
                f"{name:<12} {len(outcomes):3} kills of {outcomes[0].needed:4}  other results {other}  "
                f"stuck {stuck}  work done: {total:.3f} of the work needed, at most {max(ratios):.3f}",
                flush=True,
            )
    return int(wrong + over > 0)


if __name__ == "__main__":
    sys.exit(main())
