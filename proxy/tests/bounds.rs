//! The tables of docs/design/bounds.md match the code.

#![allow(clippy::disallowed_methods, reason = "tests may block")]

use std::fs;
use std::path::Path;

#[test]
fn table_of_resources_has_the_bounds_of_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("../docs/design/bounds.md")).unwrap();
    let mut rows = 0;
    for row in text.lines().filter(|line| line.starts_with("| ") && line.contains(".rs`")) {
        let quoted: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        let [file, name, value] = quoted[..] else { panic!("a row names a file, a constant and its value: {row}") };
        let code = fs::read_to_string(root.join("src").join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        let is_it = |line: &&str| line.contains(&format!("const {name}: "));
        let line = code.lines().find(is_it).unwrap_or_else(|| panic!("{file} has no constant {name}"));
        assert!(line.ends_with(&format!("= {value};")), "{file}: {line}");
        rows += 1;
    }
    assert!(rows > 10, "{rows} rows");
}
