//! Hot paths cost no more instructions than they did: counted by callgrind, which no noise disturbs.

use dray_tests::callgrind::of_hot_path;

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

#[test]
fn hot_paths_stay_cheap() {
    let mut wrong = Vec::new();
    for (path, bound) in BOUNDS {
        // Beside so many, what the start of a process costs is little, on a busy machine as well.
        let passes = u32::try_from(200_000_000 / bound).expect("a number of passes").max(20_000);
        let one = of_hot_path(path, passes);
        if one > bound {
            wrong.push(format!("{path}: {one}, more than {bound}"));
        }
    }
    assert!(wrong.is_empty(), "instructions a pass: {wrong:?}");
}
