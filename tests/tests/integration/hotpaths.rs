//! Hot paths stay within their number of instructions, counted by callgrind independently of the machine's load.

use dray_tests::callgrind::instructions_per_pass;

/// Bounds of the instructions of one pass: the last count plus half of it, since inlining changes between compilers.
/// Lower a bound when a path gets much cheaper; explain a higher one in the commit.
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

#[test]
fn hot_paths_stay_within_instruction_bounds() {
    let mut wrong = Vec::new();
    for (path, bound) in BOUNDS {
        // With this many passes the start of a process is negligible, even on a busy machine.
        let passes = u32::try_from(200_000_000 / bound).expect("a number of passes").max(20_000);
        let one = instructions_per_pass(path, passes);
        if one > bound {
            wrong.push(format!("{path}: {one}, more than {bound}"));
        }
    }
    assert!(wrong.is_empty(), "instructions a pass: {wrong:?}");
}
