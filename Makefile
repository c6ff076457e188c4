# Thin: each target is one or two commands that can be run by hand.
PROFILE ?= ci
TOOLS := target/tools

# One static build of everything: tests, benchmarks and the image run the same program. k8s/flags.sh says why.
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
export CARGO_BUILD_TARGET := $(HOST)
export CARGO_ENCODED_RUSTFLAGS := $(shell k8s/flags.sh)
# What `dray --version` tells.
export DRAY_COMMIT := $(shell git rev-parse --short=12 HEAD 2>/dev/null)
BUILT := target/$(HOST)
BIN := $(BUILT)/$(PROFILE)/dray

# Their program ends when a task blocks its worker (proxy/src/worker_watch.rs).
check test soak: export DRAY_WATCH_WORKERS := 1

.PHONY: run build check test lint bench soak image manifests reference docs pictures setup tools fuzz fmt release publish check-arm64

run: $(BIN) ## Build dray and start it with its built-in defaults
	$(BIN)

build: build-setup ## The program for this machine, in target/release/dray
	env -u CARGO_BUILD_TARGET -u CARGO_ENCODED_RUSTFLAGS cargo build --release --locked --package dray

check: build-setup fmt-check clippy ## What needs neither root nor Go: formatting, clippy, unit tests, simulations
	cargo test --profile $(PROFILE) --package dray -- $(TESTS)

test: setup tools ## Build, install what the tests need, and run them all, or some: make test TESTS=faults::
	tests/stage.sh "previous release" tests/previous.sh target/previous $(PROFILE)
	tests/stage.sh build cargo build --profile $(PROFILE) --workspace --all-targets
	PROGRAM=$(BIN) tests/stage.sh image k8s/image.sh target/tests/image
	tests/stage.sh tests cargo test --profile $(PROFILE) --workspace -- $(TESTS)

lint: build-setup fmt-check clippy ## Formatting, clippy, the words of the glossary, licences and bans
	cargo check --profile $(PROFILE) --package dray --no-default-features
	tests/language.sh
	tests/deny.sh

fuzz: setup ## Every fuzz target for some seconds: make fuzz SECONDS=10
	tests/fuzz.sh $(or $(SECONDS),10)

bench: setup tools ## Compare the release build with direct pulls and nginx on this machine: make bench PARTS="small cold"
	cargo build --release --workspace --bins --examples
	$(BUILT)/release/bench $(PARTS)

soak: setup tools ## The fault tests ten times as long, and 20 minutes of ordinary operation
	cargo build --profile $(PROFILE) --workspace --all-targets
	DRAY_SOAK=1 cargo test --profile $(PROFILE) --package dray-tests --test integration soak:: -- --nocapture

setup: ## Install missing system packages, or say which
	@tests/stage.sh packages tests/setup.sh

tools: ## Build the Go tools that the tests use
	@tests/stage.sh "Go tools" tests/tools.sh $(TOOLS)

fmt:
	cargo fmt --all

.PHONY: fmt-check clippy
fmt-check:
	cargo fmt --all --check

clippy: build-setup
	cargo clippy --profile $(PROFILE) --workspace --all-targets -- --deny warnings

image: setup ## A container image in target/image/oci, to be pushed by: skopeo copy oci:target/image/oci docker://...
	k8s/image.sh target/image

release: ## Everything of a release, for two architectures, in target/release-VERSION: make release VERSION=0.1.0
	@tests/stage.sh packages tests/setup.sh release
	@tests/stage.sh "Go tools" tests/tools.sh $(TOOLS) helm minisign nfpm
	release/make.sh $(VERSION) target/release-$(VERSION)

ARM64 := aarch64-unknown-linux-gnu
check-arm64: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER := aarch64-linux-gnu-gcc
check-arm64: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := qemu-aarch64-static
check-arm64: export CARGO_ENCODED_RUSTFLAGS := $(shell k8s/flags.sh aarch64-unknown-linux-gnu)
check-arm64: ## The unit tests of digests, store and wire formats for arm64, under qemu-user
	@tests/setup.sh release
	rustup target add $(ARM64)
	cargo test --profile $(PROFILE) --package dray --lib --target $(ARM64) -- oci:: store:: wire:: principal:: sealing::

publish: ## Push image and chart of a release: make publish VERSION=0.1.0 REGISTRY=registry.corp/team
	release/publish.sh target/release-$(VERSION) $(VERSION) $(REGISTRY)

reference: build-setup ## The pages of docs/reference, from the configuration, the chart and --help
	cargo build --profile $(PROFILE) --workspace --all-targets
	DRAY_WRITE_REFERENCE=1 cargo test --profile $(PROFILE) --package dray-tests --test integration reference::

docs: build-setup ## The book, in target/book
	tests/book.sh

pictures: ## The pictures of docs/images; those of the status page by Chromium
	python3 tests/pull_path.py > docs/images/pull-path.svg
	DRAY_SCREENSHOTS=$(CURDIR)/docs/images $(MAKE) test TESTS=cache_admin::status_page

manifests: tools ## The plain manifests, from the chart
	k8s/render.sh $(TOOLS)/helm

.PHONY: $(BIN)
$(BIN): build-setup
	cargo build --profile $(PROFILE) --package dray

.PHONY: build-setup
build-setup:
	@tests/setup.sh build
