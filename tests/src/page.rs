//! The status page as a browser shows it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What Chromium shows of the page in each look: light, dark, and on a phone. Screenshots go to a directory.
pub fn look(admin: SocketAddr, shots: &Path) -> Vec<Value> {
    let looked = crate::process::run(
        Command::new("python3")
            .env("PYTHONPATH", crate::tool("python"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/src/page.py"))
            .arg(format!("http://{admin}/"))
            .arg(shots),
    );
    looked.lines().map(|line| serde_json::from_str(line).expect("a line of JSON for each look")).collect()
}
