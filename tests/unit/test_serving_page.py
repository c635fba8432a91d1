"""The page in a real browser: logging in, watching, a task's page and an admin's action, by keyboard, on a phone too.

UNDERSTUDY_PICTURES=FOLDER keeps the pictures for a person to look at.
"""

from __future__ import annotations

import asyncio
import os
import pathlib

import pytest
from browser import CHROMIUM, Page, browser
from fakes import gateway
from loopback import served
from staged import CONTENT, NAMES, stage

from cluster import registry
from cluster.access import ApiKeys
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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; next: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path) as run:
            stage(run.store)
            for _ in range(5):
                await run.ask()
            key = ApiKeys(tmp_path / "keys.json").create("ann", "admin")
            async with served(run.api) as url, browser(tmp_path / "profile") as page:
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
