//! Counts of instructions: unlike times, they do not depend on the load of the machine.

use std::process::Command;

use crate::build_dir;
use crate::process::output;

/// Command line that counts the instructions of the program appended to it.
pub const CALLGRIND: [&str; 3] = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"];

/// Instructions of one pass of a hot path (`proxy/examples/hotpaths.rs`). The start of a process takes millions, and
/// the number varies, because a library calibrates the clock. So the start is subtracted, and many passes are needed.
pub fn instructions_per_pass(path: &str, passes: u32) -> u64 {
    const STARTUP_PASSES: u32 = 100;
    run_hotpaths(path, STARTUP_PASSES + passes).saturating_sub(run_hotpaths(path, STARTUP_PASSES)) / u64::from(passes)
}

fn run_hotpaths(path: &str, passes: u32) -> u64 {
    let [valgrind, options @ ..] = CALLGRIND;
    let mut command = Command::new(valgrind);
    command.args(options).arg(build_dir().join("examples/hotpaths")).args([path, &passes.to_string()]);
    let ran = output(&mut command);
    let summary = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{summary}");
    collected_instructions(&summary)
}

/// Reads the count from callgrind's summary.
pub fn collected_instructions(summary: &str) -> u64 {
    let collected = summary.lines().find_map(|line| line.split("Collected : ").nth(1)?.trim().parse().ok());
    collected.expect("callgrind's summary")
}
