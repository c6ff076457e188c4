#!/bin/sh
# Builds the Go tools that the tests use into the directory given. Each has a go.mod of its own
# under tests/tools/, so that nobody's dependency versions mix.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/tools"
for tool in *; do
    # Rebuilt only when its go.mod changed.
    stamp="$out/.$tool.$(cksum <"$tool/go.mod" | tr ' ' -)"
    [ -e "$stamp" ] && continue
    echo "building $tool"
    packages=$(cd "$tool" && go list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' tool)
    # shellcheck disable=SC2086 # a list of words
    (cd "$tool" && go build -trimpath -ldflags=-s -o "$out/" $packages)
    rm -f "$out/.$tool".*
    touch "$stamp"
done
