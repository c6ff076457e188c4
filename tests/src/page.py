"""Opens the status page in Chromium, as people do: python3 page.py URL DIRECTORY [NODES]. Screenshots go to the
directory; an assertion fails if the page lacks something. With NODES the page is asked for all nodes of the cluster."""

import json
import re
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
        errors, requests = [], []
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        # Waits by locators: Playwright's wait_for_function evaluates code repeatedly, which the page's policy forbids.
        expect(page.locator("#state")).to_have_text("live")
        shown = page.evaluate("performance.now()")
        loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        page.locator("#recent tbody tr").first.wait_for()
        if len(sys.argv) > 3:
            # Two events make a line of the rate.
            expect(page.locator("#rate path")).to_have_attribute("d", re.compile("L"))
        # The page loads everything from its own origin, and is small.
        assert all(request.startswith(url) for request in requests), requests
        assert len(page.content()) < 400_000
        # The page fits the width of a phone; wide tables scroll by themselves, also by keyboard.
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("[...document.querySelectorAll('.scroll')].every((e) => e.tabIndex === 0 && e.getAttribute('aria-labelledby'))")
        headings = page.evaluate("[...document.querySelectorAll('h1, h2')].map((e) => e.textContent)")
        assert headings[0] == "dray" and "Recent responses" in headings, headings
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.screenshot(path=f"{shots}/{name}.png")
        # Names of images are shown as text, even if they contain HTML.
        assert page.evaluate("document.querySelectorAll('main script, main img, main iframe').length") == 0
        rows = page.evaluate("document.querySelectorAll('#peers tbody tr').length")
        more = page.locator("#more")
        if more.is_visible():
            more.focus()
            page.keyboard.press("Enter")
            page.locator("#peers tbody tr").nth(rows).wait_for()
        if len(sys.argv) > 3:
            page.locator("#ask").click()
            page.locator("#nodes tbody tr").nth(int(sys.argv[3]) - 1).wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            page.locator("#cluster").screenshot(path=f"{shots}/cluster-{name}.png")
        assert not errors, errors
        print(json.dumps({"look": name, "background": back, "peers": rows, "loaded_ms": loaded, "shown_ms": shown, "text": page.inner_text("main")}))
    browser.close()
