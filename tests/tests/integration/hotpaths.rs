//! Hot paths cost no more instructions than they did: counted by callgrind, which no noise disturbs.

use std::process::Command;

use dray_tests::build_dir;
use dray_tests::process::output;

/// Instructions of one pass, as they were counted last. Who makes one cheaper or, with a good reason,
/// dearer, writes the new count here.
const COUNTS: [(&str, u64); 6] =
    [("route", 6_730), ("range", 6_170), ("spans", 400), ("ring", 108_400), ("head", 6_800), ("lookup", 2_960)];

/// Other processors and allocators differ by so much, in percent.
const TOLERANCE: u64 = 25;

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
fn hot_paths_cost_what_they_cost() {
    let mut wrong = Vec::new();
    for (path, expected) in COUNTS {
        // What the start of the process costs is in both, and differs a little from run to run.
        let passes = if expected > 5_000 { 2_000 } else { 20_000 };
        let one = (instructions(path, passes + 100) - instructions(path, 100)) / u64::from(passes);
        if one.abs_diff(expected) * 100 > expected * TOLERANCE {
            wrong.push(format!("{path}: {one} instead of {expected}"));
        }
    }
    assert!(wrong.is_empty(), "instructions a pass: {wrong:?}");
}
