#!/bin/sh
# Licences, bans and sources of all dependencies. Advisories need the Internet: run
# `cargo deny check advisories` where there is one.
set -eu
cd "$(dirname "$0")/.."
tools=$PWD/target/tools
[ -x "$tools/bin/cargo-deny" ] || cargo install --quiet --locked --root "$tools" cargo-deny@0.20.2
"$tools/bin/cargo-deny" --log-level error check bans licenses sources
