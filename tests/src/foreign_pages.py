"""Requests the registry port in Chromium, as pages of other origins do: python3 foreign_pages.py REGISTRY ATTACKER PATH PAGE.
PATH is a manifest that only dray's clients may read, PAGE one that an upstream declares as a web page. An assertion fails if a
page reads or runs something."""

import sys

from playwright.sync_api import Error, sync_playwright

registry, attacker, path, page_path = sys.argv[1:]
rebound = f"http://rebound.example:{registry.rsplit(':', 1)[1]}"
READ = """async (url) => {
    try {
        const response = await fetch(url);
        return [response.status, await response.text()];
    } catch (error) {
        return [0, String(error)];
    }
}"""
SEND = "async (url) => { try { return (await fetch(url, { mode: 'no-cors' })).type; } catch (error) { return 'failed'; } }"

with sync_playwright() as playwright:
    rules = "MAP rebound.example 127.0.0.1, MAP attacker.example 127.0.0.1"
    # Only some browsers protect local addresses from pages of the Internet: the flags turn this protection off.
    allowed = "LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,PrivateNetworkAccessSendPreflights"
    args = ["--no-sandbox", f"--host-resolver-rules={rules}", f"--disable-features={allowed}"]
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=args)
    page = browser.new_page()

    # DNS rebinding: the page's host name resolves to the registry's address, and still reads nothing.
    page.route(rebound + "/", lambda route: route.fulfill(body="<html></html>", content_type="text/html"))
    page.goto(rebound + "/")
    status, text = page.evaluate(READ, path)
    assert status == 403 and "schemaVersion" not in text, text

    # A page of another origin reads nothing, and its requests cause no upstream request, which the test counts.
    for origin in [f"http://attacker.example:{attacker}", f"http://127.0.0.1:{attacker}"]:
        page.goto(origin)
        status, text = page.evaluate(READ, registry + path)
        assert "schemaVersion" not in text, text
        page.evaluate(SEND, registry + "/v2/sent.example/from/page/manifests/1")
        page.evaluate(
            """(url) => new Promise((done) => {
                const image = new Image();
                image.onload = image.onerror = done;
                image.src = url;
            })""",
            registry + "/v2/sent.example/from/image/manifests/1",
        )

    # A manifest declared as a web page is downloaded as a file and never run.
    try:
        page.goto(registry + page_path)
        opened = "shown"
    except Error as error:
        opened = "download" if "Download is starting" in str(error) else str(error)
    assert opened == "download", opened
    assert page.title() != "ran"
    page.goto(f"http://attacker.example:{attacker}")
    ran = page.evaluate(
        """(url) => new Promise((done) => {
            window.addEventListener('message', () => done(true));
            const frame = document.createElement('iframe');
            frame.src = url;
            document.body.append(frame);
            setTimeout(() => done(false), 2000);
        })""",
        registry + page_path,
    )
    assert not ran
    browser.close()
