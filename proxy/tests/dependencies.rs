//! The table of dependencies matches Cargo.toml.

#![allow(clippy::disallowed_methods, reason = "tests may block")]

use std::collections::BTreeSet;
use std::path::Path;

fn text(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("a readable file of the project")
}

#[test]
fn table_of_dependencies_is_complete() {
    let manifest: toml::Table = text("Cargo.toml").parse().expect("a manifest");
    let used: BTreeSet<String> = manifest["dependencies"].as_table().expect("dependencies").keys().cloned().collect();
    let document = text("../docs/design/dependencies.md");
    let rows = document.lines().filter(|line| line.starts_with("| `"));
    let named = rows.flat_map(|row| row.split('|').nth(1).unwrap_or_default().split('`').skip(1).step_by(2));
    let named: BTreeSet<String> = named.map(str::to_owned).collect();
    assert!(used.len() > 40);
    assert_eq!(used, named);
}
