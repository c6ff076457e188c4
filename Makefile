# Thin: each target is one or two commands that can be run by hand.
PROFILE ?= ci
BIN := target/$(PROFILE)/dray
TOOLS := target/tools
CARGO_TEST := cargo test --profile $(PROFILE) --workspace

.PHONY: run test lint bench soak image manifests setup tools fuzz fmt

run: $(BIN) ## Build dray and start it with its built-in defaults
	$(BIN)

test: setup tools ## Build, install what the tests need, and run them all
	tests/previous.sh target/previous $(PROFILE)
	cargo build --profile $(PROFILE) --workspace --all-targets
	k8s/image.sh target/image $(PROFILE)
	$(CARGO_TEST)

lint: build-setup ## Formatting, clippy, licences and bans
	cargo fmt --all --check
	cargo clippy --profile $(PROFILE) --workspace --all-targets -- --deny warnings
	cargo check --profile $(PROFILE) --package dray --no-default-features
	tests/deny.sh

fuzz: setup ## Every fuzz target for some seconds: make fuzz SECONDS=10
	tests/fuzz.sh $(or $(SECONDS),10)

bench: setup tools ## Compare the release build with direct pulls and nginx on this machine
	cargo build --release --workspace --bins --examples
	target/release/bench

soak: setup tools ## The fault tests ten times as long, and 20 minutes of ordinary operation
	cargo build --profile $(PROFILE) --workspace --all-targets
	DRAY_SOAK=1 cargo test --profile $(PROFILE) --package dray-tests --test integration soak:: -- --nocapture

setup: ## Install missing system packages, or say which
	@tests/setup.sh

tools: ## Build the Go tools that the tests use
	@tests/tools.sh $(TOOLS)

fmt:
	cargo fmt --all

image: setup ## A container image in target/image/oci, to be pushed by: skopeo copy oci:target/image/oci docker://...
	k8s/image.sh target/image

manifests: tools ## The plain manifests, from the chart
	k8s/render.sh $(TOOLS)/helm

.PHONY: $(BIN)
$(BIN): build-setup
	cargo build --profile $(PROFILE) --package dray

.PHONY: build-setup
build-setup:
	@tests/setup.sh build
