"""The page that `rdtrain compare` writes, seen in a browser, on a phone and on a screen. Skips itself where there is no Chromium."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtrain.cli import build_parser
from rdtrain.config import load_config
from rdtrain.html_page import write_html
from rdtrain.train import train

sys.path.insert(0, str(Path(__file__).parent))
from browser import browser, chromium  # noqa: E402

COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
ALL = "[...document.querySelectorAll('{}')]"
RECTANGLES = ALL + ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
LONG = "blocks_of_the_quickstart_with_self_conditioning_and_four_untied_blocks"  # no place to break it, and wider than a phone


@pytest.fixture(scope="module")
def program() -> str:
    """Chromium's path."""
    found = chromium()
    if found is None:
        pytest.skip("no Chromium is found here: install it, or give its path in CHROMIUM")
    return found


@pytest.fixture
def report(tiny_config, tmp_path) -> Path:
    """A report of two runs by the command, which runs in here."""
    objectives = {LONG: "diffusion_blocks", "truncated BPTT": "bptt"}
    for name, objective in objectives.items():
        assert train(load_config(tiny_config(name, objective={"name": objective}))) == 0
    runs = [str(tmp_path / name) for name in objectives]
    arguments = build_parser().parse_args(["compare", *runs, "--output", str(tmp_path / "report")])
    arguments.run(arguments)
    return tmp_path / "report/report.html"


def pixels(image: Image.Image, rectangle: list[float]) -> np.ndarray:
    """[height, width, 3] in a rectangle of the page, 0 to 255."""
    return np.asarray(image.crop([round(edge) for edge in rectangle]), float)


def test_the_page_of_a_comparison_shows_its_tables_and_plots(report, program, tmp_path):
    plots = [Image.open(report.parent / f"{name}.png").convert("RGB") for name in ("nll-against-flops", "nll-against-time", "step-time")]
    with browser(program) as page:
        for width, mobile in ((400, True), (1400, False)):
            page.open(report, width, mobile=mobile)
            seen = page.screenshot()
            seen.save(tmp_path / f"report-{width}.png")

            # Nothing was complained of, and nothing fetched but the file.
            assert not [event for event in page.seen if event[0] in COMPLAINTS]
            assert {url for url in page.requests() if not url.startswith("data:image/png;base64,")} == {report.resolve().as_uri()}

            # It is as wide as the window: what is wider scrolls in its own place. Text has a size to read.
            assert page.value("document.documentElement.scrollWidth") == page.value("innerWidth") == width == seen.width
            assert page.value(f"Math.min(...{ALL.format('p, td, th')}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 15
            assert all(0 <= left < right <= width for left, _, right, _ in page.value(RECTANGLES.format("p, h1, h2, table, img")))

            # Each plot is there as it was written, in its own proportions.
            images = page.value("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
            assert images == [[True, *plot.size] for plot in plots]
            for plot, place in zip(plots, page.value(RECTANGLES.format("img"))):
                shown = pixels(seen, place)
                height, across, _ = shown.shape
                assert across / height == pytest.approx(plot.width / plot.height, rel=0.02)
                written = np.asarray(plot.resize((across, height), Image.Resampling.BOX), float)
                # 0.11 on a screen, 0.23 on the phone, where the browser's way of shrinking differs; 1 where nothing is shown.
                assert np.abs(shown - written).mean() < 0.4 * (255 - written).mean()

            # Each row of a table has ink in its first cell, which stays in sight when the table scrolls, as it must on the phone.
            rows = page.value(RECTANGLES.format("tbody tr td:first-child"))
            assert len(rows) == 15 + 8 + 2 and all((pixels(seen, row) < 100).any() for row in rows)
            wider = page.value("(t => { t.scrollLeft = 1e6; return t.scrollLeft })(document.querySelector('table'))")
            assert wider > 0 or not mobile
            assert page.value(RECTANGLES.format("tbody tr td:first-child")) == rows


def test_the_test_sees_a_page_that_is_wrong(program, tmp_path):
    """A plot that is no PNG, a script's error and a fetched file are all noticed: what the test above finds absent is not unheard."""
    (tmp_path / "report.md").write_text("# Wrong\n\n![plot](plot.png)\n")
    (tmp_path / "plot.png").write_bytes(b"no image")
    wrong = write_html(tmp_path / "report.md")
    scripts = "<script src='http://localhost/x.js'></script><script>console.error(nothing)</script>"
    wrong.write_text(wrong.read_text().replace("</body>", f"{scripts}</body>"))
    with browser(program) as page:
        page.open(wrong, 400, mobile=True)
        assert page.value("document.images[0].naturalWidth") == 0
        assert {"Runtime.exceptionThrown", "Log.entryAdded"} <= {method for method, _ in page.seen}
        assert "http://localhost/x.js" in page.requests()
