#!/usr/bin/env python3
"""The picture of the README: the way of a pull through two nodes. Prints SVG; make pictures saves it."""

WIDTH, HEIGHT = 820, 400

STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1f2328; }
  .small { font-size: 13px; fill: #59636e; }
  .step { font-weight: 700; fill: #ffffff; }
  .node { fill: #f6f8fa; stroke: #d1d9e0; }
  .part { fill: #ffffff; stroke: #59636e; }
  .dray { fill: #ddf4ff; stroke: #0969da; }
  .way { fill: none; stroke: #0969da; stroke-width: 2; marker-end: url(#pull); }
  .fallback { stroke: #59636e; stroke-dasharray: 6 5; marker-end: url(#fallback); }
  .dot { fill: #0969da; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .small { fill: #9198a1; }
    .node { fill: #151b23; stroke: #3d444d; }
    .part { fill: #0d1117; stroke: #9198a1; }
    .dray { fill: #0c2d6b; stroke: #4493f8; }
  }
"""


def box(kind, x, y, width, height, title, note=""):
    middle = x + width / 2
    lines = [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>']
    lines.append(f'<text x="{middle:g}" y="{y + 26}" text-anchor="middle">{title}</text>')
    if note:
        lines.append(f'<text class="small" x="{middle:g}" y="{y + 47}" text-anchor="middle">{note}</text>')
    return lines


def node(x, name):
    lines = [f'<rect class="node" x="{x}" y="10" width="300" height="250" rx="12"/>']
    lines.append(f'<text class="small" x="{x + 16}" y="34">{name}</text>')
    lines += box("part", x + 30, 48, 240, 62, "container runtime", "containerd, Docker, podman, ...")
    lines += box("part dray", x + 30, 180, 240, 62, "dray", "memory, disk")
    return lines


def way(path, kind=""):
    return [f'<path class="way {kind}" d="{path}"/>' if kind else f'<path class="way" d="{path}"/>']


def step(number, x, y):
    return [
        f'<circle class="dot" cx="{x}" cy="{y}" r="12"/>',
        f'<text class="step" x="{x}" y="{y + 5}" text-anchor="middle">{number}</text>',
    ]


def note(x, y, text, anchor="start"):
    return [f'<text class="small" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>']


def picture():
    lines = node(10, "node 1") + node(510, "node 2")
    lines += box("part", 540, 330, 240, 60, "upstream registry", "docker.io, ghcr.io, registry.corp, ...")
    lines += way("M160 110 V174") + step(1, 160, 140) + note(180, 145, "127.0.0.1:5050")
    lines += way("M660 110 V174") + note(680, 145, "127.0.0.1:5050")
    lines += step(2, 40, 180)
    lines += way("M280 211 H534") + step(3, 410, 211) + note(410, 242, "port 5052", "middle")
    lines += note(410, 190, "the owner of the digest", "middle")
    lines += way("M660 242 V324") + step(4, 660, 285) + note(680, 290, "once")
    lines += way("M40 79 H22 V360 H534", "fallback") + note(40, 350, "only if dray does not respond, or responds with 503")
    return lines


def main():
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">')
    print("<title>A pull through two nodes</title>")
    print(f"<style>{STYLE}</style>")
    for name, color in [("pull", "#0969da"), ("fallback", "#59636e")]:
        print(f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">')
        print(f'<path d="M0 0 L10 5 L0 10 z" fill="{color}"/></marker>')
    print("\n".join(picture()))
    print("</svg>")


main()
