"""The page in a real browser, at the width of a desk and of a phone. Skipped where there is no Chromium."""

from __future__ import annotations

from pathlib import Path
from shutil import which

import pytest
from judged import judged, trained

from linearize.eval import page

pytest.importorskip("plotly", reason="the page needs plotly: pip install 'linearize[page]'")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install 'linearize[browser]'"
)
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
HOSTILE = "<b>wide</b> <script>window.taken=1</script> <img src=x onerror='window.taken=1'> " + "name" * 40

MEASURE = """() => {
    const texts = [...document.querySelectorAll('.main-svg text')];
    const charts = [...document.querySelectorAll('[data-chart]')];
    const marks = '.main-svg .trace, .main-svg .hm image, .main-svg .bars';
    const within = (text) => {
        const inner = text.getBoundingClientRect(), outer = text.closest('[data-chart]').getBoundingClientRect();
        return inner.width === 0 || (inner.left >= outer.left - 1 && inner.right <= outer.right + 1);
    };
    return {
        wide: document.documentElement.scrollWidth - window.innerWidth,
        charts: charts.length,
        drawn: charts.filter(box => box.querySelector(marks)).length,
        clipped: texts.filter(text => !within(text)).map(text => text.textContent),
        cut: [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1)
            .map(box => box.closest('section').querySelector('h2').innerText),
        images: document.querySelectorAll('main div:not([data-chart]) > img').length,
        words: document.querySelector('main').innerText,
        labels: texts.map(text => text.textContent),
    };
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Two conversions with names that are long and hostile."""
    folder = tmp_path_factory.mktemp("page")
    trained(folder / "first")
    judged(folder / "second", name=HOSTILE, teacher=HOSTILE, sample=HOSTILE * 3)
    subjects = page.read([folder / "first", folder / "second"])
    page.write(page.compose(subjects), folder)
    return folder / "page.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_draws_every_chart_offline(browser, file, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    trouble: list[str] = []
    tab.on(
        "console",
        lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None,
    )
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else trouble.append(request.url),
    )
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-drawn]", timeout=60_000)
    tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    boxes = tab.evaluate(MEASURE)
    assert trouble == [] and tab.evaluate("window.taken") is None
    assert boxes["wide"] <= 0 and boxes["clipped"] == [] and boxes["images"] == 0
    assert boxes["charts"] == boxes["drawn"] > 10
    assert width > 600 or boxes["cut"] == []  # a phone shows every column
    assert HOSTILE in boxes["words"]  # shown as it was written
    assert any(label.startswith("<b>wide</b> <scrip") for label in boxes["labels"])
    context.close()
