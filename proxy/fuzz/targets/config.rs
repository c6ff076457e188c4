//! No file may cause a panic, and every error names the file.
#![no_main]

use dray_fuzz::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(error) = Config::parse(text, "fuzzed.toml") {
        assert!(error.to_string().contains("fuzzed.toml"));
    }
});
