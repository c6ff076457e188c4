//! Hot paths cost no more instructions than they did: counted by callgrind, which no noise disturbs.

use std::process::Command;

use dray_tests::build_dir;
use dray_tests::process::output;

/// Instructions of one pass at most: what was counted last, and half as much more for what the
/// compiler inlines one day and not the next. Who makes one much cheaper writes a lower bound here; who makes one dearer says why.
const BOUNDS: [(&str, u64); 9] = [
    ("route", 10_000),
    ("range", 8_000),
    ("spans", 450),
    ("ring", 65_000),
    ("head", 10_000),
    ("lookup", 5_000),
    ("count", 1_000),
    ("log", 5_000),
    ("note", 2_500),
];

/// Instructions of so many passes.
fn instructions(path: &str, passes: u32) -> u64 {
    let ran = output(
        Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(build_dir().join("examples/hotpaths"))
            .args([path, &passes.to_string()]),
    );
    let text = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{text}");
    let collected = text.lines().find_map(|line| line.split("Collected : ").nth(1)?.trim().parse().ok());
    collected.expect("callgrind's summary")
}

#[test]
fn hot_paths_stay_cheap() {
    let mut wrong = Vec::new();
    for (path, bound) in BOUNDS {
        // The start of a process costs millions, and never the same: a library measures the clock.
        let passes = if bound < 1_000 { 200_000 } else { 20_000 };
        let one = (instructions(path, passes + 100) - instructions(path, 100)) / u64::from(passes);
        if one > bound {
            wrong.push(format!("{path}: {one}, more than {bound}"));
        }
    }
    assert!(wrong.is_empty(), "instructions a pass: {wrong:?}");
}
