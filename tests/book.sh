#!/bin/sh
# Builds the book of docs/ into target/book, with an mdBook of its own.
set -eu
cd "$(dirname "$0")/.."
tools=$PWD/target/tools
[ -x "$tools/bin/mdbook" ] || cargo install --quiet --locked --no-default-features --root "$tools" mdbook@0.4.52
"$tools/bin/mdbook" build
