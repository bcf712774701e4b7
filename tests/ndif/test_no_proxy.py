"""A service on this machine is reached past proxies that lead nowhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from mm_adapters import zoo
from mm_adapters.ndif_client.no_proxy import directly, is_loopback

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
        monkeypatch.setenv(name.upper(), NOWHERE)
    monkeypatch.setenv("NO_PROXY", "example.com")


@pytest.mark.usefixtures("proxied")
@pytest.mark.parametrize("blocking", [True, False])
def test_a_run_reaches_a_service_on_this_machine(
    standin: Any, load: Callable[[str], Any], blocking: bool
) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{standin.host}/ping")  # The proxy is asked, and there is none.
    model = load("tiny-clip")
    inputs = model.prepare(images=[zoo.sample_images()["red_circle"]])
    site = "vision.blocks.1.hook_resid_post"
    here = model.run(inputs, read=[site])[site]
    before = dict(os.environ)
    run = model.run(inputs, read=[site], remote=standin.host, blocking=blocking)
    there = run if blocking else run.result()
    assert torch.equal(there[site], here)
    assert dict(os.environ) == before


def test_only_this_machine_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "a.example")
    for url in ("http://127.0.0.1:5", "http://localhost/x", "http://[::1]:7", "https://127.9.9.9"):
        with directly(url):
            assert os.environ["no_proxy"].startswith("a.example,")
        assert os.environ["no_proxy"] == "a.example"
    for url in ("https://api.ndif.us", "http://10.0.0.1:80", None, "http://localhost.example"):
        with directly(url):
            assert os.environ["no_proxy"] == "a.example"
    monkeypatch.delenv("no_proxy")
    with pytest.raises(KeyError), directly(NOWHERE):
        raise KeyError
    assert "no_proxy" not in os.environ
    assert not is_loopback("192.0.2.1")
