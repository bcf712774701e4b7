"""What is sent, what comes back in which way, and what is said when it does not."""

# ruff: noqa: PT012, SIM117  A traced block is one statement, and its `with` stands alone.
from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest
import tiny
import torch
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.request import RequestModel
from zoo_inputs import INPUTS

import mm_adapters as mm
from integrations.ndif.service import free_ports
from mm_adapters import remote
from mm_adapters.ndif_client.backend import Dispatch, check_service, own_version
from mm_adapters.ndif_client.errors import failed
from mm_adapters.traced import TracedModel

Load = Callable[[str], Any]
CLIP = INPUTS["tiny-clip"]
SITE = "vision.blocks.1.attn.hook_z"


# -- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(INPUTS))
def test_a_model_is_named_and_not_sent(name: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(name)
    sent: list[bytes] = []
    saved = {"run_fields": {}}
    monkeypatch.setattr(Dispatch, "_packages", lambda self: {"nnsight": "0.8.1", "mm_adapters": "local"})
    monkeypatch.setattr(Dispatch, "_await", lambda self, request, blob: sent.append(blob) or saved)
    site = next(iter(model.sitemap.sites))
    envoy = model.envoy(site)
    with model.trace(**{k: v for k, v in INPUTS[name].items() if k != "images"}, remote=True):
        model.site(site).save()
        envoy.output.save()
        model.sitemap[site]
        model.rows.count({}, {})
    assert len(sent[0]) < 20_000
    assert b"mm_adapters" in RequestModel.serialize.__func__.__globals__["dumps"](model)
    assert len(RequestModel.serialize.__func__.__globals__["dumps"](model)) < 2_000


def test_an_options_key_is_what_a_service_loads(tmp_path: Path) -> None:
    model = mm.load("tiny-clip", engine="nnsight", device="meta")
    key = model.to_model_key()
    task = '"task": "zero-shot-image-classification"'
    assert key == f'mm_adapters.traced.TracedModel:{{"repo_id": "tiny-clip", "revision": null, {task}}}'
    again = TracedModel.from_model_key(key, dispatch=True, dtype="float32", device="cpu")
    assert isinstance(again, TracedModel)
    assert again.run(CLIP).output.logits_per_image.shape == (2, 2)
    assert TracedModel.from_model_key(key).device.type == "meta"
    about = TracedModel.describe_checkpoint(key, "bfloat16")
    n = sum(p.numel() for p in again._module.parameters())
    assert about.n_params == n
    assert 2 * n <= about.size_bytes < 2 * n * 1.01
    again._module.save_pretrained(tmp_path / "mine")
    folder = mm.load(os.path.relpath(tmp_path / "mine"), engine="nnsight", device="meta")
    assert str(tmp_path / "mine") in folder.to_model_key()


def test_a_key_names_the_task_that_a_pipe_is_for() -> None:
    model = TracedModel("tiny-clip", task="sentiment-analysis")
    again = TracedModel.from_model_key(model.to_model_key())
    assert isinstance(again, TracedModel)
    assert again.task == "text-classification"  # transformers' own name of it.
    assert again.to_model_key() == model.to_model_key()
    assert TracedModel("tiny-clip").to_model_key() != model.to_model_key()
    assert "task" not in mm.load("tiny-sd", engine="nnsight", device="meta").to_model_key()


def test_the_environment_of_a_job_is_its_clients(standin: Any) -> None:
    eager = mm.load("tiny-clip", engine="nnsight", attn_implementation="eager")
    out = None
    with eager.trace(**CLIP, remote=standin.host):
        out = nnsight.save(eager._module.config._attn_implementation)
    assert out == "eager"
    plain = mm.load("tiny-clip", engine="nnsight")
    with plain.trace(**CLIP, remote=standin.host):
        out = nnsight.save(plain._module.config._attn_implementation)
    assert out == "sdpa"


def test_pictures_are_read_here(standin: Any, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Path(CLIP["images"][0])
    monkeypatch.chdir(image.parent)  # The service is somewhere else.
    there = load("tiny-clip").run({"images": [image.name], "text": ["a"]}, read=[SITE], remote=standin.host)
    here = load("tiny-clip").run({"images": [image], "text": ["a"]}, read=[SITE])
    torch.testing.assert_close(here[SITE], there[SITE], rtol=1e-5, atol=1e-5)


# -- what cannot go ------------------------------------------------------------------------------


def test_what_cannot_go_remote_says_so_and_does_not_run_here(load: Load) -> None:
    built = tiny.CASES["clip"]()
    ran: list[int] = []
    built.model.register_forward_pre_hook(lambda *_: ran.append(1))
    mine = TracedModel(built.model)
    for way in (True, "http://127.0.0.1:1"):
        with pytest.raises(ValueError, match="made from an object"):
            with mine.trace(**built.inputs, remote=way):
                mine.output.save()
        with pytest.raises(ValueError, match="made from an object"):
            mine.run(built.inputs, read=["vision.blocks.0.attn.hook_z"], remote=way)
        with pytest.raises(ValueError, match="made from an object"):
            with mine.session(remote=way):
                with mine.trace(**built.inputs):
                    mine.output.save()
        with pytest.raises(ValueError, match="is a part of a model"):
            with mine.vision_model.trace(built.inputs["pixel_values"], remote=way):
                mine.vision_model.output.save()
        with pytest.raises(ValueError, match="is a part of a model"):
            with load("tiny-clip").vision_model.session(remote=way):
                pass
        with pytest.raises(ValueError, match="runs here"):
            with load("tiny-clip").scan(**CLIP, remote=way):
                load("tiny-clip").output.save()
    assert not ran


# -- errors --------------------------------------------------------------------------------------


def run(model: Any, host: str, **options: Any) -> Any:
    return model.run(CLIP, read=[SITE], remote=host, **options)


def test_a_service_that_is_not_there(load: Load) -> None:
    host = f"http://127.0.0.1:{free_ports('one')['one']}"
    for blocking in (True, False):
        with pytest.raises(remote.ServiceDownError, match="mm-interp ndif up") as caught:
            run(load("tiny-clip"), host, blocking=blocking)
        assert host in str(caught.value)


def test_keys_and_versions_that_a_service_turns_down(
    make_standin: Callable[..., Any], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = make_standin("--key", "right", "--nnsight-at-least", "0.8.2")
    with pytest.raises(remote.AccessError, match="NDIF_API_KEY"):
        run(load("tiny-clip"), strict.host)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "wrong")
    with pytest.raises(remote.AccessError, match="Missing or invalid API key"):
        run(load("tiny-clip"), strict.host, blocking=False)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "right")
    with pytest.raises(remote.VersionMismatchError, match=r"below the minimum"):
        run(load("tiny-clip"), strict.host)


def test_a_service_with_other_versions() -> None:
    good = {"nnsight": nnsight.__version__, "mm_adapters": own_version()}
    check_service(good, "HOST")
    check_service(good | {"mm_adapters": "local"}, "HOST")
    with pytest.raises(remote.VersionMismatchError, match=r"HOST runs nnsight 0\.7\.0 and here is"):
        check_service(good | {"nnsight": "0.7.0"}, "HOST")
    if own_version() != "local":
        with pytest.raises(remote.VersionMismatchError, match=r"HOST has mm-interp 9\.9"):
            check_service(good | {"mm_adapters": "9.9"}, "HOST")


def test_a_model_that_the_service_does_not_have(host: str, tmp_path: Path) -> None:
    model = mm.load("tiny-clip", engine="nnsight")
    model._module.save_pretrained(tmp_path / "gone")
    gone = mm.load(str(tmp_path / "gone"), engine="nnsight", device="meta")
    for file in (tmp_path / "gone").iterdir():
        file.unlink()
    (tmp_path / "gone").rmdir()
    with pytest.raises(remote.NotServedError, match="gone"):
        run(gone, host)


@pytest.mark.parametrize(
    "shown", ["", "\nTraceback (most recent call last):\n  File evaluator.py, line 218…"]
)
def test_what_ndif_says_when_it_cannot_deploy_is_that_it_does_not_serve(shown: str) -> None:
    error = failed(f"Could not deploy this model. There is no model 'a/b'.{shown}", "Key:a/b", "http://here")
    assert isinstance(error, remote.NotServedError)
    assert "http://here does not serve Key:a/b: Could not deploy" in str(error)
    assert "Traceback" not in str(error)
    raised = failed(
        "Traceback (most recent call last):\n  File deploy.py\nValueError: 1", "Key:a/b", "http://here"
    )
    assert type(raised) is RemoteError


def test_a_job_that_raises_shows_the_users_line(host: str, load: Load) -> None:
    model = load("tiny-clip")
    with pytest.raises(RemoteError, match=r"z = model.*\n.*raise|1 / 0") as caught:
        with model.trace(**CLIP, remote=host):
            z = model.site(SITE)
            z.sum() + 1 / 0
    assert "ZeroDivisionError" in str(caught.value)
    assert "1 / 0" in str(caught.value)
    assert Path(__file__).name in str(caught.value)
    assert run(model, host).values  # The service goes on.


def test_our_own_errors_come_back_as_what_they_are(host: str, load: Load) -> None:
    model = load("tiny-clip")
    with pytest.raises(mm.EditNeverFiredError, match="no step 3"):
        model.run(CLIP, edit=[mm.Edit(SITE, torch.relu, steps=[3])], remote=host)
    with pytest.raises(mm.MissingSiteError, match="The nearest are"):
        with model.trace(**CLIP, remote=host):
            model.site("vision.blocks.1.attn.hook_zz").save()
    with pytest.raises(RemoteError, match=r"OutOfOrderError"):
        with model.trace(**CLIP, remote=host):
            model.site("vision.blocks.2.attn.hook_z").save()
            model.site("vision.blocks.1.attn.hook_z").save()


# -- ways back -----------------------------------------------------------------------------------


def test_a_run_that_is_not_waited_for(host: str, load: Load) -> None:
    model = load("tiny-clip")
    pending = run(model, host, blocking=False)
    assert isinstance(pending, remote.PendingRun)
    here = model.run(CLIP, read=[SITE])
    torch.testing.assert_close(here[SITE], pending.result(timeout_s=120.0)[SITE], rtol=1e-5, atol=1e-5)
    elsewhere = mm.load("tiny-clip", engine="nnsight", device="meta")
    again = remote.resume(elsewhere, pending.id, host=host).result(timeout_s=60.0)
    torch.testing.assert_close(here[SITE], again[SITE], rtol=1e-5, atol=1e-5)


def test_a_block_that_is_not_waited_for(host: str, load: Load) -> None:
    model = load("tiny-clip")
    with model.trace(**CLIP, remote=host, blocking=False) as tracer:
        z = model.site(SITE).detach().save()  # noqa: F841
    assert tracer.backend.job_id
    saved = tracer.backend.wait(timeout_s=120.0)
    torch.testing.assert_close(model.run(CLIP, read=[SITE])[SITE], saved["z"], rtol=1e-5, atol=1e-5)


def test_a_result_larger_than_a_websocket_takes(host: str, load: Load) -> None:
    model = load("tiny-clip")
    torch.manual_seed(3)
    big = torch.empty(0)
    with model.trace(**CLIP, remote=host):
        torch.manual_seed(3)
        big = nnsight.save(torch.randn(6_000_000))
    assert torch.equal(big, torch.randn(6_000_000))


def test_a_connection_that_breaks_in_the_middle_of_a_job(standin: Any, load: Load) -> None:
    model = load("tiny-clip")
    run(model, standin.host)
    dropped: list[float] = []

    def drop() -> None:
        time.sleep(1.0)
        standin.post("/drop")
        dropped.append(time.monotonic())

    threading.Thread(target=drop).start()
    slow = [mm.Edit(SITE, lambda z: __import__("time").sleep(2.5) or z * 0)]
    there = model.run(CLIP, read=[SITE], edit=slow, remote=standin.host)
    assert dropped
    assert torch.equal(there[SITE], torch.zeros_like(there[SITE]))


def test_a_job_that_the_service_lost_is_an_error_and_can_be_sent_again(standin: Any, load: Load) -> None:
    model = load("tiny-clip")
    pending = run(model, standin.host, blocking=False)
    pending._job.wait(60.0)
    standin.post("/forget")
    with pytest.raises(remote.JobLostError, match="has no record of job"):
        pending.result(resend=False)
    expected = model.run(CLIP, read=[SITE])[SITE]
    torch.testing.assert_close(pending.result()[SITE], expected, rtol=1e-5, atol=1e-5)
    standin.post("/forget")
    with pytest.raises(remote.JobLostError, match="sent by another process"):
        resumed = remote.resume(model, pending.id, host=standin.host)
        resumed._job.grace_s = 0.0
        resumed.result()
