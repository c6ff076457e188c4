//! Modules import only modules of lower levels.

#![allow(clippy::disallowed_methods, reason = "tests may block")]

use std::fs;
use std::path::Path;

const LEVELS: [&[&str]; 11] = [
    &["times", "worker_watch"],
    &["bandwidth", "blocking", "key_file", "confirmed_at", "metrics", "oci", "readiness", "shares", "trace"],
    &[
        "activity",
        "principal",
        "config",
        "single_flight",
        "identity",
        "lifetimes",
        "memory",
        "provenance",
        "role",
        "sealing",
        "secret",
    ],
    &["connections", "dns", "token_issuer", "registries", "source", "store"],
    &["upstream", "peers", "fill", "tags", "telemetry"],
    &["access_log", "pull"],
    &["respond"],
    &["probe_image", "status"],
    &["proxy", "admin", "containerd", "runtimes", "warm"],
    &["prefetch"],
    &["server", "commands", "main", "lib"],
];

fn level(module: &str) -> usize {
    let found = LEVELS.iter().position(|modules| modules.contains(&module));
    found.unwrap_or_else(|| panic!("module {module} has no level: add it to tests/levels.rs"))
}

/// Every `crate::module` in a file.
fn imports(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let parts = code.split("crate::").skip(1);
    parts.map(|rest| rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect()).collect()
}

fn check(path: &Path, module: &str, seen: &mut usize) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a readable directory") {
            check(&entry.expect("an entry").path(), module, seen);
        }
        return;
    }
    let text = fs::read_to_string(path).expect("a readable file");
    for import in imports(&text).into_iter().filter(|import| import != module) {
        assert!(level(&import) < level(module), "{} ({module}) must not import {import}", path.display());
        *seen += 1;
    }
}

#[test]
fn imports_point_down() {
    let mut seen = 0;
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).expect("the sources") {
        let path = entry.expect("an entry").path();
        let module = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
        level(&module);
        check(&path, &module, &mut seen);
    }
    assert!(seen > 50, "the test sees the imports");
}
