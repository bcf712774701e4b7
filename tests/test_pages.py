"""The pages that commands write, opened in a browser: every picture is there, nothing runs over the edge."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mm_adapters import cli
from mm_adapters.zoo import labels, world
from mm_adapters.zoo.measures import images_of

METHODS = EntryPoint("methods", "methods_multimodal.commands:register", cli.GROUP)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
# Counts what did not load and what is wider than the window; the browser prints the page after it ran.
PROBE = """<script>addEventListener("load", () => {
  // A picture that is shown several times is a background, so that the page holds it once.
  const shown = [...document.querySelectorAll("[role=img]")];
  const lacks = e => !getComputedStyle(e).backgroundImage.startsWith('url("data:image/png') || !e.clientWidth;
  const broken = [...document.images].filter(i => !i.naturalWidth).length + shown.filter(lacks).length;
  const over = document.documentElement.scrollWidth - innerWidth;
  const n = document.images.length + shown.length;
  document.title = `images ${n} broken ${broken} over ${Math.max(0, over)}`;
})</script></body>"""


def seen(page: Path, width: int) -> tuple[int, int, int]:
    """Images, broken images, and by how many pixels the page is wider than the window."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text("utf-8").replace("</body>", PROBE), "utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},900",
            "--dump-dom",
            "--virtual-time-budget=10000",
            f"--user-data-dir={page.parent / 'browser'}",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = re.search(r"<title>images (\d+) broken (\d+) over (\d+)</title>", done.stdout)
    assert found, done.stdout[:500]
    return int(found[1]), int(found[2]), int(found[3])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(images_of([world.scene(i, "validation", kind="one") for i in range(48)])):
        image.save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("width", [1300, 700])
@pytest.mark.parametrize("command", ["heads", "dissect"])
def test_a_page_shows_all_its_pictures_within_the_window(
    command: str, width: int, images: Path, tmp_path: Path
) -> None:
    if command == "heads":
        options = ["--vocabulary", "world", "--texts", "2", "--top", "3"]
        page = "heads.html"
    else:
        (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in labels.NAMES))
        options = [
            "--site",
            "vision.blocks.3.hook_resid_post",
            "--concepts",
            str(tmp_path / "names.txt"),
            "--cards",
            "6",
        ]
        page = "index.html"
    out = tmp_path / "out"
    result = CliRunner().invoke(
        cli.build((METHODS,)), [command, "--images", str(images), "--out", str(out), *options]
    )
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    n_images, broken, over = seen(out / page, width)
    assert n_images > 20
    assert broken == 0
    assert over == 0
