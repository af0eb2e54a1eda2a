"""A headless Chromium: that of the system, the one that BROWSER names, or Playwright's own."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The browser; tests skip without Playwright, or without a browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    named = os.environ.get("BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        there = named or playwright.chromium.executable_path
        if not Path(there).exists():
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        sandbox = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []  # Chromium wants it of root
        started = playwright.chromium.launch(executable_path=there, args=sandbox)
        yield started
        started.close()
