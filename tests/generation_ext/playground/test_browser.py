# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The playground as a person uses it, in a real browser: clicks, a mistake, a narrow window, a reload.

Needs `pip install playwright gradio` and a Chromium (Debian's will do).
"""

from __future__ import annotations

import shutil

import pytest

from generation_ext.playground.answers import Answers
from generation_ext.playground.exhibits import Exhibits


gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")]


@pytest.fixture(scope="module")
def address(hub, tmp_path_factory):
    from generation_ext.playground.page import make_page

    folder = tmp_path_factory.mktemp("playground")
    page = make_page(Answers(Exhibits("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder))))
    _, local, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield local
    page.close()


@pytest.fixture
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_every_tab(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.set_default_timeout(120_000)
    page.goto(address)
    page.click("#adapters-go")
    page.wait_for_function("document.querySelector('#adapters-right textarea').value.length > 30")
    page.get_by_role("tab", name="Steer").click()
    page.click("#steer-go")
    page.wait_for_selector("#steer-plain span.tokens")
    page.get_by_role("tab", name="Not mine").click()
    page.click("#intent-go")
    page.wait_for_selector("#intent-verdict b")
    page.fill("#intent-text textarea", " ")
    page.click("#intent-go")
    page.get_by_text("the text is empty").wait_for()
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.wait_for_selector("#adapters-go")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    assert all(url.startswith((address.rstrip("/"), "data:", "blob:")) for url in elsewhere)
