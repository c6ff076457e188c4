#!/usr/bin/env python3
"""Writes the licences of all crates in the program: release/notices.py FILE TARGET"""

import json
import pathlib
import re
import subprocess
import sys

FILES = re.compile(r"(licen[cs]e|copying|notice|copyright|unlicense)([-._].*)?$", re.IGNORECASE)
CODE = {".rs", ".c", ".h", ".py", ".go", ".js", ".sh"}

# What is linked beside crates.
OTHERS = """\
Rust standard library: MIT OR Apache-2.0, https://github.com/rust-lang/rust
GNU C Library, linked statically: LGPL-2.1-or-later, https://sourceware.org/glibc. This program can be linked with another
version of it: its sources and this list of crates are all that a build needs.
GCC runtime library: GPL-3.0-or-later with the GCC Runtime Library Exception, https://gcc.gnu.org"""


def is_licence(path):
    """Whether a file has the text of a licence, also of code that a crate brings along in a folder."""
    return bool(FILES.match(path.name)) and path.suffix.lower() not in CODE


def packages(target):
    """The crates that are linked into dray for a target, without those of this workspace."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    metadata = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    known = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    pending = [package["id"] for package in metadata["packages"] if package["name"] == "dray"]
    seen = set()
    while pending:
        crate = pending.pop()
        if crate in seen:
            continue
        seen.add(crate)
        for dependency in nodes[crate]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                pending.append(dependency["pkg"])
    linked = (known[crate] for crate in seen if known[crate]["source"])
    return sorted(linked, key=lambda package: (package["name"], package["version"]))


def texts(package):
    """The texts of the licence files beside a crate's manifest."""
    folder = pathlib.Path(package["manifest_path"]).parent
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_licence(path))
    return [path.read_text(encoding="utf-8", errors="replace").strip() for path in files]


def main(out, target):
    crates = packages(target)
    users = {}
    lines = ["dray contains:", "", OTHERS, "", "These crates:", ""]
    for package in crates:
        label = f"{package['name']} {package['version']}"
        lines.append(f"{label}: {package['license'] or 'see below'}, {package['repository'] or 'crates.io'}")
        found = texts(package)
        if not found:
            lines[-1] += " (no text in the crate)"
        for text in found:
            users.setdefault(text, []).append(label)
    for text, names in sorted(users.items(), key=lambda item: item[1]):
        lines += ["", "-" * 80, ", ".join(names), "", text]
    pathlib.Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


main(sys.argv[1], sys.argv[2])
