//! No upstream header may cause a panic.
#![no_main]

use dray_fuzz::upstream::challenge::Challenge;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|lines: Vec<&[u8]>| {
    let _ = Challenge::pick(lines.into_iter());
});
