"""The page at /, in a real browser: a chosen expert beside the base, a mix, errors, a key, and a second question."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page_of(browser) -> Iterator[Callable[[str], Any]]:
    """Opens a server's page; the test fails if the page asks anybody else for anything, or if its script fails."""
    opened = []

    def open_page(url: str) -> Any:
        page = browser.new_page()
        foreign: list[str] = []
        failures: list[str] = []
        page.on("request", lambda asked: None if asked.url.startswith(url) else foreign.append(asked.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(url)
        opened.append((page, foreign, failures))
        return page

    yield open_page
    for page, foreign, failures in opened:
        page.close()
        assert not foreign and not failures


def ask(page: Any, prompt: str) -> tuple[str, str]:
    """Both answers, when both are whole."""
    page.fill("#prompt", prompt)
    page.click("#go")
    for place in ("expert", "base"):
        playwright.expect(page.locator(f"#about-{place}")).to_have_text(re.compile(r"^\d+ tokens, [\d.]+ tokens/s"))
    return page.inner_text("#text-expert"), page.inner_text("#text-base")


def api_text(running: Any, model: str, prompt: str, tokens: int) -> str:
    import openai

    client = openai.OpenAI(base_url=running.url + "/v1", api_key="none")
    said: Any = [{"role": "user", "content": prompt}]
    reply = client.chat.completions.create(model=model, messages=said, max_tokens=tokens, temperature=0)
    return reply.choices[0].message.content or ""


def test_expert_and_base_side_by_side(serving, page_of):
    running = serving(eos_ids=())
    page = page_of(running.url)
    playwright.expect(page.locator("#model option")).to_have_text(["auto", "red", "green", "toy"])
    page.select_option("#model", "red")
    page.fill("#tokens", "12")
    for prompt in ("say red", "say green two"):  # the second question takes the place of the first
        expert, base = ask(page, prompt)
        assert expert.split() == api_text(running, "red", prompt, 12).split()
        assert base.split() == api_text(running, "toy", prompt, 12).split()
        assert expert != base and page.inner_text("#name-expert") == "red"
        assert page.inner_text("#about-expert").startswith("12 tokens, ")


def test_who_was_chosen_and_why(serving, page_of):
    page = page_of(serving(eos_ids=()).url)
    page.select_option("#model", "auto")
    page.fill("#tokens", "4")
    ask(page, "say red")
    assert re.fullmatch(r"auto: (base|red|green)", page.inner_text("#name-expert"))
    assert re.search(r"; .*others \d+%.*, first pass \d+ ms$", page.inner_text("#about-expert"))


def test_mixes_and_errors(serving, page_of):
    running = serving(eos_ids=())
    page = page_of(running.url)
    page.fill("#tokens", "8")
    page.fill("#mix", "red:0.5+green:0.5")
    expert, _ = ask(page, "say red")
    assert expert.split() == api_text(running, "red:0.5+green:0.5", "say red", 8).split()
    page.fill("#mix", "nobody")
    page.click("#go")
    playwright.expect(page.locator("#text-expert.error")).to_contain_text("expected one of toy, auto, red, green")


def test_a_key(serving, page_of):
    page = page_of(serving(api_keys=("secret",), eos_ids=()).url)
    playwright.expect(page.locator("#model option")).to_have_count(0)
    page.fill("#prompt", "say red")
    page.click("#go")
    playwright.expect(page.locator("#text-base.error")).to_contain_text("expected a valid key")
    page.fill("#key", "secret")
    page.locator("#key").blur()
    playwright.expect(page.locator("#model option")).to_have_count(4)
    page.fill("#tokens", "8")
    ask(page, "say red")
