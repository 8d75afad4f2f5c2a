"""The page of `mmopd watch` in Chromium: a whole run, a server that dies on the way, keyboard, contrast, a phone."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from growing_run import KILLED, READY, STEPS, grow

from mmopd.serving import guarded_http
from mmopd.watch.server import application, listen, url

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; on Debian: apt install chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `dev`")

TOKEN = "secret"
STEP = 0.6  # seconds; the page asks every 2 seconds
PATIENCE = 120.0  # seconds; a busy machine is no failure
# Text that has less contrast than WCAG 2.2 AA asks for: 4.5, or 3 for large letters.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true }), known = {};
  const rgba = c => known[c] ??= (canvas.clearRect(0, 0, 1, 1), canvas.fillStyle = c, canvas.fillRect(0, 0, 1, 1),
    [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255));
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const ground = e => e ? over(rgba(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [1, 1, 1];
  const light = c => c.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode());) {
    const e = node.parentElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
    const text = node.textContent.trim();
    if (!text || !box.width || style.visibility === "hidden" || e.closest("script, noscript")) continue;
    const behind = ground(e), ink = over(rgba(e.closest("svg") ? style.fill : style.color), behind);
    const [a, b] = [light(ink), light(behind)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5))
      found.push(`${ratio.toFixed(2)} ${e.tagName}.${e.getAttribute("class")} ${text.slice(0, 40)}`);
  }
  return [...new Set(found)];
}"""
FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  if (e === document.body) return null;
  const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
  return [e.id || e.dataset.part || e.className || e.tagName, seen];
}"""


@contextmanager
def served(*runs: Path) -> Iterator[str]:
    """Serve the page from a thread while the block lasts."""
    import uvicorn

    with listen(0) as listening:
        app = application(runs, TOKEN)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **guarded_http.settings())
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield url(listening.getsockname()[1], TOKEN)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Without its sandbox, which a container may not allow: the pages are ours.
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def open_page(browser: Any, address: str, **settings: Any) -> tuple[Any, list[str]]:
    """Return a page, and the list to which all that goes wrong in it is added."""
    page, wrong = browser.new_page(**settings), []  # type: ignore[var-annotated]
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda said: wrong.append(said.text) if said.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((address, "data:")) else None)
    page.goto(address)
    page.wait_for_selector("#link.live")
    return page, wrong


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so; playwright's own waiting for a function is refused by the page."""
    begin = time.monotonic()
    while not is_so():
        assert time.monotonic() < begin + PATIENCE
        time.sleep(0.1)


def steps_drawn(page: Any) -> int:
    return int(page.evaluate("(document.querySelector('#curves .plot')?.data ?? [{x: []}])[0].x.length"))


def test_a_run_is_watched_from_its_first_step_to_its_last(browser: Any, tmp_path: Path) -> None:
    steps = grow(tmp_path / "run", STEP)
    next(steps)
    with served(tmp_path / "run") as address:
        page, wrong = open_page(browser, address, viewport={"width": 1280, "height": 900})
        until(lambda: "1 of 20" in page.inner_text("[data-part=now]"))
        until(lambda: steps_drawn(page) == 1)
        seen = threading.Event()

        def write() -> None:
            for step in steps:
                if step == READY - 1:  # the server is started again only when its death was seen
                    seen.wait(PATIENCE)

        writer = threading.Thread(target=write)
        writer.start()
        drawn = [steps_drawn(page)]
        while drawn[-1] < STEPS:
            time.sleep(0.3)
            now = steps_drawn(page)
            drawn += [now] if now != drawn[-1] else []
            if "ended with status -9, started again" in page.inner_text("[data-part=processes]"):
                seen.set()
        writer.join()
        assert drawn == sorted(drawn)
        assert len(drawn) > 4, "the curves did not grow"
        assert seen.is_set(), "the death of the server was not shown while it lasted"
        until(lambda: "finished" in page.inner_text("[data-part=now]"))
        assert f"server {KILLED} ended with status -9 and is being restarted" in page.inner_text("[data-part=faults]")
        assert f"in step {STEPS - 1}?" in page.inner_text("[data-part=responses]")
        assert page.locator("[data-part=responses] img").count() > 0
        page.select_option("#log-name", "rank1.log")
        until(lambda: "rank1 is here" in page.inner_text("[data-part=log]"))
    page.wait_for_selector("#lost:not([hidden])")
    assert "no longer served" in page.inner_text("#lost")
    assert [one for one in wrong if "ERR_CONNECTION_REFUSED" not in one and "Failed to fetch" not in one] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    with closing(grow(root, 0.0)) as steps:
        assert [*steps][-1] == STEPS - 1
    return root


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_desk_and_on_a_phone_in_both_colours(browser: Any, finished: Path, scheme: str) -> None:
    with served(finished, finished) as two, served(finished) as one:
        for address, width in ((one, 1280), (one, 390), (two, 390)):
            page, wrong = open_page(browser, address, viewport={"width": width, "height": 844}, color_scheme=scheme)
            page.evaluate("document.getElementById('curves').scrollIntoView()")  # drawn when they come near
            page.wait_for_selector(".chart .main-svg")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{width} pixels are too few"
            assert page.evaluate(CONTRAST) == []
            assert wrong == []
            page.close()


def test_everything_is_reached_by_keyboard(browser: Any, finished: Path) -> None:
    with served(finished) as address:
        page, wrong = open_page(browser, address, viewport={"width": 1280, "height": 900})
        page.wait_for_selector(".tokens")
        reached = {}
        for _ in range(200):
            page.keyboard.press("Tab")
            if (now := page.evaluate(FOCUSED)) is None:
                break
            reached[now[0]] = now[1]
        assert {"theme", "log-name", "log", "tokens"} <= reached.keys()
        assert [name for name, seen in reached.items() if not seen] == [], "the focus is not seen"
        page.focus(".tokens")
        page.keyboard.press("ArrowRight")
        assert "student" in page.inner_text("#tip")
        page.keyboard.press("Escape")
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.focus("#theme")
        page.keyboard.press("Enter")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert wrong == []
