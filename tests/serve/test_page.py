"""The page in a real headless browser: Debian's Chromium, driven by playwright; skipped where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import orthrus
from tests.conftest import CHAT_TEMPLATE
from tests.families import tiny
from tests.serve.conftest import Running, running
from tests.serve.scripted import Scripted

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need a browser: apt-get install chromium")

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
REPLIES = {
    "markdown": (
        "# Title\n\nSome **bold** and `code`, a [link](https://example.org), *so*.\n\n- one\n- two\n  - deep\n\n"
        "1. first\n2. second\n\n```python\nif a < b:\n    print(a)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quoted"
    ),
    "danger": (
        "<script>window.hacked = 1</script> <img src=x onerror='window.hacked = 1'> "
        "[go](javascript:alert(1)) ![x](https://example.org/x.png) **<b>bold</b>** `<i>`\n\n```html\n<img src=y>\n```"
    ),
    "letters": f"שלום עולם, {FAMILY} und 🇩🇪 e\u0301",
}


def reply(prompt: str) -> str:
    """Answer the last thing that was said."""
    said = prompt.rsplit("u:", 1)[1].split(";")[0]
    return REPLIES.get(said, f"You said {said}, and so it is." * 3)


@pytest.fixture(scope="module")
def chatty(bytelevel: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a chat template: a block may end within any character."""
    return PreTrainedTokenizerFast(tokenizer_object=bytelevel.backend_tokenizer, chat_template=CHAT_TEMPLATE)


@contextmanager
def scripted(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Iterator[tuple[Running, Scripted]]:
    """A server whose answers are those of `reply`."""
    pause = settings.pop("pause_after", None)
    model = orthrus.attach(
        tiny("qwen2", vocab_size=256, max_position_embeddings=4096), orthrus.OrthrusConfig(block_size=6)
    )
    with running(model, tokenizer, rows=2, **settings) as server:
        engine = Scripted(tokenizer, reply, pause_after=pause)
        plain = Scripted(tokenizer, reply, plain=True)
        server.service.loop._make = {"orthrus": lambda: engine, "ar": lambda: plain}  # type: ignore[dict-item, return-value]
        yield server, engine


@pytest.fixture(scope="module")
def site(chatty: PreTrainedTokenizerFast) -> Iterator[tuple[Running, Scripted]]:
    with scripted(chatty) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page of a new visitor; it must not complain, and it must ask nobody else."""
    complaints: list[str] = []
    context = browser.new_context(**{"reduced_motion": "reduce", **options})
    context.set_default_timeout(20_000)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    page.wait_for_selector("#model:not(:empty), .problem")
    yield page
    context.close()
    assert complaints == []


def say(page: Any, text: str) -> Any:
    """Ask something, wait for the end of the answer, return the turn."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector(".turn:last-child .column:not(.writing) .facts b")
    return page.locator(".turn").last


def test_two_turns_of_a_chat_show_blocks_meter_and_plot(browser: Any, site: tuple[Running, Scripted]) -> None:
    server, engine = site
    with opened(browser, server.url) as page:
        _, second = say(page, "one"), say(page, "two")
        assert page.locator(".turn .answer").first.inner_text() == reply("u:one;")
        assert engine.prompts[-1] == f"u:one;a:{reply('u:one;')};u:two;a:"  # the turn before goes with it
        spans = second.locator(".answer span[data-cycle]")
        assert [span.get_attribute("class") for span in spans.all()[:4]] == ["draft", "bonus"] * 2
        assert spans.first.inner_text() == "You "
        assert spans.nth(1).inner_text() == "s"
        assert spans.first.evaluate("e => getComputedStyle(e).backgroundColor") != spans.nth(1).evaluate(
            "e => getComputedStyle(e).backgroundColor"
        )
        spans.first.hover()
        assert page.locator("#tip").inner_text() == "Cycle 1 · 4 of 7 drafts kept · 5 tokens"
        assert second.locator(".lit").count() == 3  # drafts and bonus in the text, a bar in the plot
        cycles = second.locator(".plot g").count()
        assert cycles == -(-len(reply("u:two;")) // 5)
        assert page.locator("#per-pass").inner_text() == f"{len(reply('u:two;')) / (2 * cycles + 1):.2f}"
        page.click("label.switch")
        assert spans.first.evaluate("e => getComputedStyle(e).backgroundColor") == "rgba(0, 0, 0, 0)"


def test_a_stream_is_stopped_its_row_freed_and_the_answer_asked_for_again(
    browser: Any, chatty: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(chatty, pause_after=3) as (server, engine), opened(browser, server.url) as page:
        cancelled = server.called(monkeypatch, "cancel")
        page.fill("#text", "one")
        page.press("#text", "Enter")
        page.wait_for_selector(".answer span:nth-of-type(6)")
        assert engine.paused.wait(30)
        page.press("#text", "Escape")
        page.wait_for_selector(".facts >> text=stopped")
        assert page.locator(".answer").inner_text() == reply("u:one;")[:15]
        assert cancelled.acquire(timeout=30)
        engine.go_on.set()
        server.settle()
        assert server.service.loop.open == 0
        page.click(".tools >> text=Regenerate")
        page.wait_for_selector(".facts >> text=tokens/s")
        page.wait_for_selector("#send.primary")
        assert page.locator(".turn").count() == 1
        assert page.locator(".answer").inner_text() == reply("u:one;")
        assert engine.prompts[-1] == "u:one;a:"


def test_what_a_model_writes_is_text_and_never_html(browser: Any, site: tuple[Running, Scripted]) -> None:
    with opened(browser, site[0].url) as page:
        turn = say(page, "danger")
        answer = turn.locator(".answer")
        assert answer.locator("script, img, iframe, b, i").count() == 0
        assert page.evaluate("window.hacked") is None
        text = answer.inner_text()
        for written in (
            "<script>window.hacked = 1</script>",
            "onerror='window.hacked = 1'>",
            "<b>bold</b>",
            "<img src=y>",
        ):
            assert written in text
        assert [link.get_attribute("href") for link in answer.locator("a").all()] == ["https://example.org/x.png"]
        said = say(page, "<img src=x onerror=window.hacked=2>")
        assert said.locator(".said img").count() == 0
        assert page.evaluate("window.hacked") is None


def test_markdown_is_shown_as_such_with_its_blocks(browser: Any, site: tuple[Running, Scripted]) -> None:
    with opened(browser, site[0].url) as page:
        answer = say(page, "markdown").locator(".answer")
        assert answer.locator("h2").inner_text() == "Title"
        assert answer.locator("strong").inner_text() == "bold"
        assert answer.locator("em").inner_text() == "so"
        assert answer.locator("p code").inner_text() == "code"
        assert answer.locator("a").get_attribute("href") == "https://example.org"
        assert answer.locator("ul > li").all_inner_texts()[0] == "one"
        assert answer.locator("ul ul li").inner_text() == "deep"
        assert answer.locator("ol > li").all_inner_texts() == ["first", "second"]
        assert answer.locator("pre").inner_text().strip() == "if a < b:\n    print(a)"
        assert answer.locator("figcaption span").inner_text() == "python"
        assert answer.locator("td").all_inner_texts() == ["1", "2"]
        assert answer.locator("blockquote").inner_text() == "quoted"
        assert answer.locator("pre .draft").count() > 0
        assert answer.locator("td .draft, td .bonus").count() > 0


def test_no_character_is_broken_by_blocks_and_scripts_run_their_own_way(
    browser: Any, site: tuple[Running, Scripted]
) -> None:
    with opened(browser, site[0].url) as page:
        answer = say(page, "letters").locator(".answer")
        assert answer.inner_text() == REPLIES["letters"]
        pieces = answer.locator("span[data-cycle]").all_inner_texts()
        assert any(FAMILY in piece for piece in pieces)
        assert any("🇩🇪" in piece for piece in pieces)
        assert any("e\u0301" in piece for piece in pieces)
        assert answer.locator("p").evaluate("e => getComputedStyle(e).direction") == "rtl"


def test_plain_decoding_runs_beside_on_request(browser: Any, site: tuple[Running, Scripted]) -> None:
    with opened(browser, site[0].url) as page:
        turn = say(page, "one")
        turn.locator(".tools >> text=Compare").click()
        page.wait_for_selector(".verdict")
        assert turn.locator(".verdict b").first.inner_text() == "The same text"
        both = turn.locator(".answer").all_inner_texts()
        assert both[0] == both[1] == reply("u:one;")
        assert turn.locator(".column").last.locator(".draft").count() == 0


def test_settings_reach_the_server_and_a_missing_key_is_told(browser: Any, chatty: PreTrainedTokenizerFast) -> None:
    with scripted(chatty, key="secret") as (server, engine):
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector(".problem >> text=API key")
        page.click("#open-settings")
        page.fill("#set-key", "secret")
        page.fill("#set-system", "Be kind")
        page.fill("#set-max_tokens", "7")
        page.select_option("#set-theme", "dark")
        page.click("#settings .primary")
        page.wait_for_selector("#model:not(:empty)")
        turn = say(page, "one")
        assert engine.prompts == ["s:Be kind;u:one;a:"]
        assert turn.locator(".answer").inner_text() == "You sai"
        assert turn.locator(".facts >> text=cut").count() == 1
        assert page.locator("html").get_attribute("data-theme") == "dark"
        page.reload()
        assert page.locator("#set-system").input_value() == "Be kind"
        context.close()


def test_narrow_screens_and_dark_ones_are_served(browser: Any, site: tuple[Running, Scripted]) -> None:
    light: list[str] = []
    for scheme in ("light", "dark"):
        with opened(browser, site[0].url, viewport={"width": 360, "height": 640}, color_scheme=scheme) as page:
            say(page, "markdown")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            light.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert light[0] != light[1]
