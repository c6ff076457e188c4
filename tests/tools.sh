#!/bin/sh
# Builds the tools that the tests use into the directory given. Those in Go have a go.mod each under
# tests/tools/, so that nobody's dependency versions mix.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/tools"

# Debian's Go may be too old for the tools: any Go can fetch a newer one as a module.
wanted=$(sed -n 's/^go //p' ./*/go.mod | sort -V | tail -n 1)
present=$(go env GOVERSION | sed 's/^go//')
if [ "$(printf '%s\n%s\n' "$wanted" "$present" | sort -V | head -n 1)" != "$wanted" ]; then
    root="$out/go-$wanted"
    if [ ! -x "$root/bin/go" ]; then
        echo "fetching Go $wanted"
        module=golang.org/toolchain@v0.0.1-go$wanted.$(go env GOOS)-$(go env GOARCH)
        dir=$(cd "$out" && GO111MODULE=on GOFLAGS=-mod=mod go mod download -json "$module" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
        cp -r "$dir" "$root.new"
        # Modules carry no permissions.
        chmod -R u+w "$root.new" && chmod +x "$root.new"/bin/* "$root.new"/pkg/tool/*/*
        mv "$root.new" "$root"
    fi
    PATH="$root/bin:$PATH"
    export PATH GOTOOLCHAIN=local
fi

# Holds manifests against the schemas of Kubernetes, which it carries; a server that answers as Amazon does;
# what drives a browser.
python="kubernetes-validate==1.37.0 moto==5.2.5 flask==3.1.3 flask-cors==6.0.5 playwright==1.65.2"
stamp="$out/.python.$(echo "$python" | cksum | tr ' ' -)"
if [ ! -e "$stamp" ]; then
    echo "installing $python"
    rm -rf "$out/python" "$out"/.python.*
    # shellcheck disable=SC2086 # a list of words
    pip3 install --quiet --disable-pip-version-check --root-user-action=ignore --target "$out/python" $python
    touch "$stamp"
fi

# What a program has to be told of itself when it is linked: clients ask a cluster for its version.
flags() {
    go list -f '{{with .Module}}{{if eq .Path "k8s.io/kubernetes"}}-X k8s.io/component-base/version.gitVersion={{.Version}}{{end}}{{end}}' \
        tool | head -n 1
}

for tool in *; do
    # Rebuilt only when its go.mod changed.
    stamp="$out/.$tool.$(cksum <"$tool/go.mod" | tr ' ' -)"
    [ -e "$stamp" ] && continue
    echo "building $tool"
    packages=$(cd "$tool" && go list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' tool)
    # shellcheck disable=SC2086 # a list of words
    (cd "$tool" && go build -trimpath -ldflags="-s $(flags)" -o "$out/" $packages)
    rm -f "$out/.$tool".*
    touch "$stamp"
done
