#!/usr/bin/env python3
"""dray beside other caches that can be had as packages: the same k6 scenarios, the same images, the same registry behind.

    loadtest/rivals.py                    # some minutes; prints a table, writes loadtest/rivals.svg
    SECONDS=5 loadtest/rivals.py          # shorter

Each cache is asked alone, in turns, ROUNDS times (3); figures are medians. What cannot be found is left out and said.
A pull is that of `pull.js`: tag, manifest, blobs. Cold means that the cache is empty and the registry is asked; the rest
is warm. CPU is user and system time of the cache's processes for each GB that left it.
"""

import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = int(os.environ.get("SECONDS", "10"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
IMAGES = 4
LAYER = 32_000_000
FIRST = 24000 + os.getpid() % 5000


def program(name, built):
    path = HERE.parent / built
    return str(path) if path.exists() else shutil.which(name)


DRAY = os.environ.get("DRAY") or program("dray", "target/release/dray")
K6 = os.environ.get("K6") or program("k6", "target/tools/k6")


def wait_for(url, process):
    for _ in range(200):
        if process.poll() is not None:
            sys.exit(f"{process.args[0]} ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"{url} does not answer")


def start(arguments, url, **more):
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **more)
    wait_for(url, process)
    return process


def stop(process):
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cpu(process):
    """User and system seconds of a process and those that it started and that run in its session."""
    ticks = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == process.pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Dray:
    name, needs = "dray", DRAY

    def run(self, work, port, origin):
        (work / "dray.toml").write_text(f'[[registry]]\nmatch = "load.example"\nupstreams = ["{origin}"]\ntag_ttl = "1h"\n')
        return start(
            [DRAY, "--config", work / "dray.toml", "--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{port + 1}", "--cache-dir", work / "cache", "--log", "error,access=off"],
            f"http://127.0.0.1:{port}/v2/")


class DockerRegistry:
    name, needs = "docker-registry, proxy", shutil.which("docker-registry")

    def run(self, work, port, origin):
        (work / "proxy.yml").write_text(
            f'version: 0.1\nlog: {{accesslog: {{disabled: true}}, level: error}}\nstorage: {{filesystem: {{rootdirectory: {work}/cache}}}}\n'
            f'http: {{addr: "127.0.0.1:{port}"}}\nproxy: {{remoteurl: "{origin}"}}\n')
        return start([self.needs, "serve", work / "proxy.yml"], f"http://127.0.0.1:{port}/v2/")


class Nginx:
    name, needs = "nginx, proxy_cache", shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

    def run(self, work, port, origin):
        # Its workers would run as somebody else, who may not write here.
        user = "user root;\n" if os.geteuid() == 0 else ""
        (work / "nginx.conf").write_text(
            user + f"worker_processes auto; daemon off; error_log /dev/null; pid {work}/pid;\nevents {{ worker_connections 1024; }}\n"
            f"http {{ access_log off; sendfile on; tcp_nopush on; proxy_cache_path {work}/cache keys_zone=k:8m max_size=8g inactive=1d use_temp_path=off;\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {origin}; proxy_cache k; proxy_cache_lock on; proxy_cache_lock_timeout 60s;\n"
            "proxy_cache_valid 200 1h; proxy_cache_convert_head off; proxy_cache_key $request_method$request_uri; } } }\n")
        return start([self.needs, "-c", work / "nginx.conf"], f"http://127.0.0.1:{port}/v2/")


class Varnish:
    name, needs = "varnish, memory", shutil.which("varnishd") or shutil.which("varnishd", path="/usr/sbin")

    def run(self, work, port, origin):
        host, at = origin.removeprefix("http://").split(":")
        (work / "varnish.vcl").write_text(
            f'vcl 4.1; backend origin {{ .host = "{host}"; .port = "{at}"; }}\n'
            "sub vcl_backend_response { set beresp.ttl = 1h; set beresp.do_stream = true; }\n")
        return start(
            [self.needs, "-F", "-a", f"127.0.0.1:{port}", "-f", work / "varnish.vcl", "-s", "malloc,1G", "-n", work / "varnish"],
            f"http://127.0.0.1:{port}/v2/")


def k6(script, base, images, out, **variables):
    arguments = [K6, "run", "--quiet", "--no-usage-report", "--env", f"BASE={base}", "--env", f"IMAGES={images}", "--env", f"OUT={out}"]
    for name, value in variables.items():
        arguments += ["--env", f"{name}={value}"]
    done = subprocess.run([*arguments, HERE / script], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} at {base}:\n{done.stdout}{done.stderr}")
    return {name: metric["values"] for name, metric in json.loads(pathlib.Path(f"{out}.json").read_text())["metrics"].items()}


def round_of(rival, nth, work, port, origin, images):
    work = pathlib.Path(tempfile.mkdtemp(dir=work))
    if isinstance(rival, Varnish):
        work.chmod(0o755)
    process = rival.run(work, port, origin)
    base = f"http://127.0.0.1:{port}"
    try:
        cold = k6("pull.js", base, images, work / "cold", VUS=1, ITERATIONS=IMAGES)
        before = cpu(process)
        blobs = k6("blobs.js", base, images, work / "blobs", VUS=8, DURATION=SECONDS)
        spent = cpu(process) - before
        tags = k6("manifests.js", base, images, work / "tags", RATE=500, BURST=1500, DURATION=max(2, SECONDS // 2))
    finally:
        stop(process)
        shutil.rmtree(work, ignore_errors=True)
    return {
        "cold pull, ms": cold["pull"]["med"],
        "warm blobs, GB/s": blobs["pulled_bytes"]["rate"] / 1e9,
        "CPU s/GB": spent / (blobs["pulled_bytes"]["count"] / 1e9),
        "tag, 99 of 100, ms": tags["first_byte"]["p(99)"],
    }


def picture(table):
    """Bars for each figure, as wide as the page that shows them."""
    lines, y = [], 10
    for figure in next(iter(table.values())):
        most = max(row[figure] for row in table.values())
        lines.append(f'<text x="0" y="{y + 14}" class="head">{figure}</text>')
        y += 24
        for name, row in table.items():
            width = 420 * row[figure] / most
            lines.append(f'<text x="0" y="{y + 12}">{name}</text><rect x="170" y="{y + 1}" width="{width:.1f}" height="14" class="{"own" if name == "dray" else "other"}"/>'
                         f'<text x="{178 + width:.1f}" y="{y + 12}">{row[figure]:.3g}</text>')
            y += 20
        y += 14
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {y}" role="img" aria-label="dray beside other caches">\n<style>text {{ font: 12px system-ui, sans-serif; fill: #57606a }} .head {{ font-weight: 600 }} '
            '.own { fill: #1a7f5a } .other { fill: #8fa3b5 }</style>\n' + "\n".join(lines) + "\n</svg>\n")


def main():
    if not (DRAY and K6 and DockerRegistry.needs):
        sys.exit("dray, k6 and docker-registry are needed")
    rivals = [rival() for rival in (Dray, DockerRegistry, Nginx, Varnish)]
    for rival in [rival for rival in rivals if not rival.needs]:
        print(f"left out, not installed: {rival.name}", file=sys.stderr)
        rivals.remove(rival)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        work = pathlib.Path(directory)
        work.chmod(0o755)
        origin = f"http://127.0.0.1:{FIRST}"
        (work / "origin.yml").write_text(
            f'version: 0.1\nlog: {{accesslog: {{disabled: true}}, level: error}}\nstorage: {{filesystem: {{rootdirectory: {work}/origin}}}}\nhttp: {{addr: "127.0.0.1:{FIRST}"}}\n')
        registry = start([DockerRegistry.needs, "serve", work / "origin.yml"], f"{origin}/v2/")
        try:
            names = []
            for nth in range(IMAGES):
                subprocess.run([HERE / "seed.sh", origin, f"team/app{nth}", "1", str(LAYER), "100000", "2000"], check=True)
                names.append(f"load.example/team/app{nth}:1")
            rounds = {rival.name: [] for rival in rivals}
            for nth in range(ROUNDS):
                for rival in rivals:
                    rounds[rival.name].append(round_of(rival, nth, work, FIRST + 10, origin, ",".join(names)))
                    print(f"round {nth + 1}: {rival.name}", file=sys.stderr)
        finally:
            stop(registry)
    table = {name: {figure: statistics.median(row[figure] for row in rows) for figure in rows[0]} for name, rows in rounds.items()}
    figures = list(next(iter(table.values())))
    print("| | " + " | ".join(figures) + " |\n|---|" + "---|" * len(figures))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[figure]:.3g}" for figure in figures) + " |")
    (HERE / "rivals.svg").write_text(picture(table))


if __name__ == "__main__":
    main()
