#!/bin/sh
# Builds the tools of the tests, or some of them, into a directory: tests/tools.sh OUT [TOOL...]. Each Go tool has its own
# go.mod under tests/tools/, so that their dependency versions do not mix.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/tools"

# Debian's Go may be too old for the tools. Any Go can download a newer one as a module.
wanted=$(sed -n 's/^go //p' ./*/go.mod | sort -V | tail -n 1)
present=$(go env GOVERSION | sed 's/^go//')
if [ "$(printf '%s\n%s\n' "$wanted" "$present" | sort -V | head -n 1)" != "$wanted" ]; then
    root="$out/go-$wanted"
    if [ ! -x "$root/bin/go" ]; then
        echo "downloading Go $wanted"
        module=golang.org/toolchain@v0.0.1-go$wanted.$(go env GOOS)-$(go env GOARCH)
        dir=$(cd "$out" && GO111MODULE=on GOFLAGS=-mod=mod go mod download -json "$module" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
        cp -r "$dir" "$root.new"
        # Files of Go modules have no execute permission.
        chmod -R u+w "$root.new" && chmod +x "$root.new"/bin/* "$root.new"/pkg/tool/*/*
        mv "$root.new" "$root"
    fi
    PATH="$root/bin:$PATH"
    export PATH GOTOOLCHAIN=local
fi

# A validator of manifests with the schemas of Kubernetes; a server that emulates AWS; a driver for browsers; a validator of CI
# configurations.
python="kubernetes-validate==1.37.0 moto==5.2.5 flask==3.1.3 flask-cors==6.0.5 playwright==1.65.2 check-jsonschema==0.39.0"
stamp="$out/.python.$(echo "$python" | cksum | tr ' ' -)"
if [ $# = 0 ] && [ ! -e "$stamp" ]; then
    echo "installing $python"
    rm -rf "$out/python" "$out"/.python.*
    # shellcheck disable=SC2086 # a list of words
    pip3 install --quiet --disable-pip-version-check --root-user-action=ignore --target "$out/python" $python
    touch "$stamp"
fi

# The version that is linked into the Kubernetes programs: clients request it from a cluster.
flags() {
    go list -f '{{with .Module}}{{if eq .Path "k8s.io/kubernetes"}}-X k8s.io/component-base/version.gitVersion={{.Version}}{{end}}{{end}}' \
        tool | head -n 1
}

[ $# -gt 0 ] || set -- *
for tool in "$@"; do
    # Rebuilt only when its go.mod or a source of its own changes.
    stamp="$out/.$tool.$(find "$tool" -name go.mod -o -name '*.go' | sort | xargs cat | cksum | tr ' ' -)"
    [ -e "$stamp" ] && continue
    echo "building $tool"
    packages=$(cd "$tool" && go list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' tool)
    # shellcheck disable=SC2086 # a list of words
    (cd "$tool" && go build -trimpath -ldflags="-s $(flags)" -o "$out/" $packages)
    rm -f "$out/.$tool".*
    touch "$stamp"
done
