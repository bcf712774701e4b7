"""Stored work belongs to the model, the data and the settings it was made with: a table over all jobs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from mm_adapters import StoreError
from tests.fuzz.jobs import BY_NAME, CHANGES, JOBS, Setting, pictures
from tests.fuzz.kills import kills

# Those that take a while are killed by hand: python -m tests.fuzz.kills.
_SHORT = ("collect", "sae", "name_heads", "dissect", "patch_words")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.mark.parametrize("name", [job.name for job in JOBS])
def test_work_of_another_model_other_data_or_settings_is_refused_and_the_same_goes_on(
    tmp_path: Path, data: Path, name: str
) -> None:
    job, work = BY_NAME[name], []
    setting = Setting(tmp_path / name, data)
    setting.folder.mkdir()
    job.run(setting, work.append)
    first, needed = job.artefact(setting.folder), sum(work)
    for changed in [change for change in CHANGES if change not in job.without]:
        work.clear()
        with pytest.raises(StoreError, match=r"differ .*there .*asked for .*afresh"):
            job.run(replace(setting, changed=changed), work.append)
        assert sum(work) <= 8, "it did work before it refused"
    assert job.artefact(setting.folder) == first
    work.clear()
    job.run(setting, work.append)
    assert sum(work) <= 0.1 * needed
    assert job.artefact(setting.folder) == first


@pytest.mark.parametrize("name", _SHORT)
def test_a_job_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    for outcome in kills(BY_NAME[name], 2, random.Random(3), tmp_path):
        assert outcome.went_on
        assert outcome.same
        assert outcome.ratio < 1.6  # On a busy machine; what it is elsewhere, `tests.fuzz.kills` says.
