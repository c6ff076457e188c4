//! Instructions, which no noise of the machine changes.

use std::process::Command;

use crate::build_dir;
use crate::process::output;

/// What counts the instructions of the program that follows.
pub const COUNTED: [&str; 3] = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"];

/// Instructions of one pass of a hot path (`proxy/examples/hotpaths.rs`). The start of a process costs millions, and never
/// the same, since a library measures the clock: it is taken out, and wants many passes.
pub fn of_hot_path(path: &str, passes: u32) -> u64 {
    const BEFORE: u32 = 100;
    ran(path, BEFORE + passes).saturating_sub(ran(path, BEFORE)) / u64::from(passes)
}

fn ran(path: &str, passes: u32) -> u64 {
    let [valgrind, options @ ..] = COUNTED;
    let mut command = Command::new(valgrind);
    command.args(options).arg(build_dir().join("examples/hotpaths")).args([path, &passes.to_string()]);
    let ran = output(&mut command);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{said}");
    collected(&said)
}

/// What callgrind says at the end.
pub fn collected(said: &str) -> u64 {
    let collected = said.lines().find_map(|line| line.split("Collected : ").nth(1)?.trim().parse().ok());
    collected.expect("callgrind's summary")
}
