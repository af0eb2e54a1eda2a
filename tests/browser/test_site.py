"""The site in a real browser: on a wide screen and on a phone, every page loads whole and without an error."""

import functools
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in (ROOT / "docs").rglob("*.md"))
READ = [page for page in PAGES if not page.startswith("api/")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)], cwd=ROOT, check=True)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module", params=[(1400, "light"), (420, "dark")], ids=["wide", "phone"])
def tab(browser, request):
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    yield opened
    opened.close()


def address(page):
    return "/" if page == "index" else f"/{page.removesuffix('/index').removesuffix('index')}/"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_whole_and_without_errors(tab, site, page):
    said = []
    listeners = {
        "console": lambda one: one.type == "error" and said.append(one.text),
        "pageerror": lambda one: said.append(str(one)),
        # What is given up because the tab goes on to the next page has not failed.
        "requestfailed": lambda one: one.failure == "net::ERR_ABORTED" or said.append(f"{one.url}: {one.failure}"),
        "request": lambda one: one.url.startswith((site, "data:", "blob:")) or said.append(f"fetched {one.url}"),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(site + address(page))
    assert tab.locator("article h1").count() == 1
    broken = "[...document.querySelectorAll('article img')].filter(one => one.offsetParent && !one.naturalWidth).length"
    tab.wait_for_function(f"{broken} === 0")
    without = "[...document.querySelectorAll('article img')].filter(one => !one.alt).length"
    assert tab.evaluate(without) == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert said == []


def test_a_search_opens_the_page(browser, site):
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.goto(f"{site}/")
    opened.locator("input.md-search__input").fill("TensorRT")
    first = opened.locator("a.md-search-result__link").first
    first.wait_for()
    first.click()
    opened.wait_for_url(lambda url: url != f"{site}/")
    assert "TensorRT" in opened.locator("article").inner_text()
    opened.close()
