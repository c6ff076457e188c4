"""Looks at the status page in Chromium, as people do: python3 page.py URL DIRECTORY. Screenshots go to the directory;
what a person would miss is an assertion that fails."""

import json
import sys

from playwright.sync_api import expect, sync_playwright

expect.set_options(timeout=30_000)
url, shots = sys.argv[1], sys.argv[2]
looks = [("light", "light", 1280, 1400), ("dark", "dark", 1280, 1400), ("phone", "light", 390, 1600)]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    for name, scheme, width, height in looks:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        # By locators: a function that the page is asked again and again is an eval, which its policy forbids.
        expect(page.locator("#state")).to_have_text("live")
        shown = page.evaluate("performance.now()")
        loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        page.locator("#recent tbody tr").first.wait_for()
        # All of it comes from here, in one piece.
        assert all(request.startswith(url) for request in asked), asked
        assert len(page.content()) < 400_000
        # Nothing sticks out on a phone; wide tables scroll by themselves, by keyboard as well.
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("[...document.querySelectorAll('.scroll')].every((e) => e.tabIndex === 0 && e.getAttribute('aria-labelledby'))")
        headings = page.evaluate("[...document.querySelectorAll('h1, h2')].map((e) => e.textContent)")
        assert headings[0] == "dray" and "Last answers" in headings, headings
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.screenshot(path=f"{shots}/{name}.png", full_page=True)
        # Names of images are text, whatever they look like.
        assert page.evaluate("document.querySelectorAll('main script, main img, main iframe').length") == 0
        rows = page.evaluate("document.querySelectorAll('#peers tbody tr').length")
        more = page.locator("#more")
        if more.is_visible():
            more.focus()
            page.keyboard.press("Enter")
            page.locator("#peers tbody tr").nth(rows).wait_for()
        assert not said, said
        print(json.dumps({"look": name, "background": back, "peers": rows, "loaded_ms": loaded, "shown_ms": shown, "text": page.inner_text("main")}))
    browser.close()
