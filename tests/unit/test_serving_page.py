"""The page in a real browser: logging in, watching, a task's page and an admin's action, by keyboard, on a phone too.

UNDERSTUDY_PICTURES=FOLDER keeps the pictures for a person to look at.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import time
from collections.abc import Iterator

import pytest
from axe import RUN, NoAxe, axe_source
from browser import CHROMIUM, Page, browser, tab
from fakes import Running, gateway
from loopback import served
from staged import CONTENT, NAMES, conversion, other_release, stage

from cluster import registry
from cluster.access import ApiKeys
from cluster.conversions import write_conversion
from cluster.store import Store

ENTER, ESCAPE, TAB = ("Enter", 13), ("Escape", 27), ("Tab", 9)
BOARD = """document.querySelectorAll('#tasks tbody tr').length === 6 && document.getElementById('tasks').textContent.includes('p50')
    && document.querySelectorAll('#live tbody tr').length > 2"""
UNNAMED = """[...document.querySelectorAll('button, a, input, select')].filter((one) => one.offsetParent &&
    !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).length"""
# WCAG 2.2's contrast of each visible text with what is behind it: the least ratio.
CONTRAST = """(() => {
    const ink = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const rgb = (color) => { ink.clearRect(0, 0, 1, 1); ink.fillStyle = color; ink.fillRect(0, 0, 1, 1);
        return [...ink.getImageData(0, 0, 1, 1).data]; };
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
    const behind = (one) => { for (; one; one = one.parentElement) {
        const found = rgb(getComputedStyle(one).backgroundColor); if (found[3] === 255) return found; } return [255, 255, 255]; };
    let least = 21;
    for (const one of document.querySelectorAll('main *, header *')) {
        const says = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!says || !one.offsetParent || one.disabled || one.closest('tr.fresh')) continue;
        const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
        least = Math.min(least, (a + 0.05) / (b + 0.05));
    }
    return least;
})()"""


MAX_PAYLOAD_BYTES = 64 * 1024
"""Of the page without what it shows; one screen on a slow phone's connection."""
MEASURED = """(() => { const all = [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
    .filter((one) => !/status\\/(session|overview|live|tasks)/.test(one.name));
    return {paint_ms: performance.getEntriesByName('first-contentful-paint')[0]?.startTime, requests: all.length,
        bytes: all.reduce((sum, one) => sum + one.transferSize, 0)}; })()"""
# As one script, before the browser tells the page of what was closed: on a busy machine people are as fast.
CANCEL = "document.getElementById('dialog').close('cancel')"
ROLL_BACK, FREEZE = (f"document.getElementById('do-{name}').click()" for name in ("rollback", "freeze"))
DISTINCT = ((1200, "light"), (360, "dark"))
"""Width and scheme: each layout and each set of colours once. A layout changes no colour, so the other two tell of the same."""
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; next: apt-get install chromium"
)


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One browser for all of them; each test has a tab whose storage no other sees."""
    with browser(tmp_path_factory.mktemp("profile")) as url:
        yield url


@needs_chromium
def test_the_page_in_a_browser(tmp_path: pathlib.Path, devtools: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            stage(run.store)
            for _ in range(5):
                await run.ask()
            key = ApiKeys(tmp_path / "keys.json").create("ann", "admin")
            async with served(run.api) as url, tab(devtools) as page:
                await _log_in(page, url, key)
                await _look_at_each_size(page)
                await _freeze_by_keyboard(page, run.store)
                assert registry.is_frozen(run.store)
                await _read_a_task(page)
                text = await page.value("document.documentElement.outerHTML")
                assert CONTENT not in text and key not in text
                ApiKeys(tmp_path / "keys.json").revoke("ann")
                await page.until("!document.getElementById('login').hidden && !document.querySelector('#tasks table')")
                assert await page.value("sessionStorage.length") == 0
                # The browser itself tells of the request that was refused; there must be nothing else.
                assert all("401" in one for one in page.complaints), page.complaints

    asyncio.run(scenario())


@needs_chromium
def test_an_admin_s_actions_and_a_conversion_s_ends_in_a_browser(tmp_path: pathlib.Path, devtools: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            served_sha = stage(run.store)
            other = other_release(run.store)
            registry.freeze(run.store, "holiday")
            key = ApiKeys(tmp_path / "keys.json").create("ann", "admin")
            await run.ask()
            async with served(run.api) as url, tab(devtools) as page:
                await page.show(width=1200, scheme="light")
                await page.open(url)
                await page.type(key)
                await page.key(*ENTER)
                await page.until("document.getElementById('do-freeze')?.textContent.startsWith('Unfreeze')")
                write_conversion(run.store, conversion(started_ts=time.time() - 1_000, updated_ts=time.time() - 600))
                await page.value(f"{ROLL_BACK}; {CANCEL}; {FREEZE}; document.getElementById('dialog-yes').click()")
                await page.until("document.getElementById('said').textContent.includes('No longer frozen')")
                assert not registry.is_frozen(run.store)
                assert registry.current_sha(run.store) == served_sha  # What was cancelled is not done.
                await _see_conversion(page, "It has said nothing for 10 min; it may have been killed")
                write_conversion(run.store, conversion(state="failed", error="TrainingError", runs=()))
                choice = "document.getElementById('stage-choice').value = 'canary'"
                await _confirm(page, f"promote-{other}", "is promoted", choice)
                found = registry.current(run.store)
                assert found and found[0] != served_sha and "refund" not in found[1].specialists
                await _see_conversion(page, "It has failed (TrainingError; its log says why)")
                write_conversion(run.store, conversion(state="done", stage=None, release="f" * 64, runs=()))
                await _confirm(page, "do-rollback", "Rolled back", f"{CANCEL}; {ROLL_BACK}")
                assert registry.current_sha(run.store) == served_sha
                await _see_conversion(page, "It made release ffffffffffff")
                await _watch_decisions(page, run)
                assert page.complaints == []

    asyncio.run(scenario())


@needs_chromium
def test_axe_finds_nothing_serious_on_any_page_and_the_page_is_small(
    tmp_path: pathlib.Path, devtools: str, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        axe = axe_source(pytestconfig.cache.mkdir("axe"))
    except NoAxe as error:
        pytest.skip(str(error))
    seen: dict[str, list[str]] = {}

    async def check(page: Page, name: str, run: str = RUN) -> None:
        for width, scheme in DISTINCT:
            await page.show(width=width, scheme=scheme)
            seen[f"{name} {width} {scheme}"] = await page.value(run)

    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            stage(run.store)
            other_release(run.store)
            await run.ask()
            key = ApiKeys(tmp_path / "keys.json").create("ann", "admin")
            async with served(run.api) as url, tab(devtools) as page:
                await page.open(url)
                await page.until("performance.getEntriesByName('first-contentful-paint').length")
                measured = await page.value(MEASURED)
                with capsys.disabled():
                    print(
                        f"\npage: first paint {measured['paint_ms']:.0f} ms, {measured['bytes']} bytes, {measured['requests']} requests"
                    )
                assert measured["requests"] == 3 and 0 < measured["bytes"] < MAX_PAYLOAD_BYTES
                await page.value(axe + "; 0")
                await check(page, "login")
                await page.type(key)
                await page.key(*ENTER)
                await page.until(
                    "document.querySelectorAll('#tasks tbody tr').length === 6 && document.getElementById('do-freeze')"
                )
                await check(page, "board")
                for button in ("do-freeze", "do-rollback"):
                    await page.value(f"document.getElementById('{button}').click()")
                    await check(page, button, run=RUN.replace("document", "'#dialog'"))
                    await page.key(*ESCAPE)
                await page.value("location.hash = '#/tasks/triage'")
                await page.until("document.querySelectorAll('#task-body table').length")
                await check(page, "task")

    asyncio.run(scenario())
    assert len(seen) == 10
    with capsys.disabled():
        print(f"axe: {sorted({one.split(':')[0] for found in seen.values() for one in found}) or 'nothing'}")
    assert [
        (where, one) for where, found in seen.items() for one in found if one.startswith(("serious", "critical"))
    ] == []


async def _confirm(page: Page, button: str, said: str, before: str = "0") -> None:
    """Press a button of the page and the dialog's yes; `before` runs while it is open."""
    await page.until(f"document.getElementById('{button}') && !document.getElementById('{button}').disabled")
    await page.value(f"document.getElementById('{button}').click()")
    await page.until("document.getElementById('dialog').open")
    await _picture(page, f"dialog-{button[:11]}")
    await page.value(before)
    await page.value("document.getElementById('dialog-yes').click()")
    await page.until(f"document.getElementById('said').textContent.includes('{said}')")


async def _watch_decisions(page: Page, run: Running) -> None:
    rows = "document.querySelectorAll('#live tbody tr').length"
    before = await page.value(rows)
    await run.ask()
    await page.until(f"{rows} === {before + 1}")
    await page.value("document.getElementById('pause').click()")
    run.engine.confidence = 0.1
    await run.ask()
    await page.until(f"Number(document.querySelector('#counts dd').textContent) === {before + 2}")
    assert await page.value(rows) == before + 1
    # The LLM has told its price: what it would have asked for the kept calls, 100 tokens in and 10 out each.
    saved = f"Saved, estimated\\n${(before + 1) * 120e-6:.4f}"
    await page.until(f"document.getElementById('counts').innerText.includes('{saved}')")
    assert await page.value("document.getElementById('pause').getAttribute('aria-pressed')") == "true"


async def _see_conversion(page: Page, said: str) -> None:
    assert said in await page.value("document.getElementById('conversion').innerText")
    await _picture(page, f"conversion-{said.split()[-1]}")


async def _log_in(page: Page, url: str, key: str) -> None:
    await page.show(width=1200, scheme="light")
    await page.open(url)
    await page.until("document.activeElement.id === 'key'")
    assert await page.value("document.getElementById('board').hidden") and page.complaints == []
    await page.type("us-wrong")
    await page.key(*ENTER)
    await page.until("document.getElementById('trouble').textContent.includes('Incorrect')")
    await page.type(key)
    await page.key(*ENTER)
    await page.until(BOARD)
    text = await page.value("document.body.innerText")
    assert all(name in text for name in NAMES.values()) and "4 of 240 differ" in text
    assert "step 120 of 400, loss 0.412" in text and "no price yet" in text
    assert await page.value("document.querySelector('#conversion [aria-current=step]').textContent") == "finetune"
    assert await page.value("document.querySelectorAll('#conversion progress').length") == 2
    assert await page.value("document.cookie + Object.keys(localStorage).join()") == ""


async def _look_at_each_size(page: Page) -> None:
    for width in (1200, 360):
        for scheme in ("light", "dark"):
            await page.show(width=width, scheme=scheme)
            assert await page.value("document.documentElement.scrollWidth") <= width
            assert await page.value(CONTRAST) >= 4.5 and await page.value(UNNAMED) == 0
            await _picture(page, f"board-{width}-{scheme}")


async def _freeze_by_keyboard(page: Page, store: Store) -> None:
    await page.show(width=1200, scheme="light")
    for words in ([ESCAPE], [ENTER], [TAB, ENTER]):
        assert not registry.is_frozen(store)
        await page.value("document.getElementById('do-freeze').focus()")
        await page.key(*ENTER)
        await page.until("document.getElementById('dialog').open && document.activeElement.value === 'cancel'")
        await _picture(page, "dialog")
        if len(words) == 2:
            await page.value("document.getElementById('reason').focus()")
            await page.type("holiday")
            await page.value("document.activeElement.blur(); document.querySelector('#dialog [value=cancel]').focus()")
        for word in words:
            await page.key(*word)
        await page.until("!document.getElementById('dialog').open")
    await page.until("document.getElementById('said').textContent.includes('Frozen')")
    await page.until("document.getElementById('stage').textContent.includes('holiday')")
    assert await page.value("document.getElementById('said').getAttribute('aria-live')") == "polite"


async def _read_a_task(page: Page) -> None:
    await page.value("document.getElementById('go-triage').focus()")
    await page.key(*ENTER)
    await page.until(
        "document.querySelectorAll('#task-body table').length === 2 && document.activeElement.id === 'task-title'"
    )
    text = await page.value("document.body.innerText")
    assert "specialist + gate" in text and "understudy tasks triage --examples" in text
    assert NAMES["triage"] in await page.value("document.title")
    for width in (1200, 360):
        await page.show(width=width, scheme="dark")
        assert await page.value("document.documentElement.scrollWidth") <= width and await page.value(CONTRAST) >= 4.5
        await _picture(page, f"task-{width}")


async def _picture(page: Page, name: str) -> None:
    if folder := os.environ.get("UNDERSTUDY_PICTURES"):
        await page.picture(pathlib.Path(folder) / f"{name}.png")
