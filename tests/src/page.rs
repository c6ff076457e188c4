//! The status page as a browser shows it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Opens the page in Chromium three times: light, dark, and on a phone. Returns what Chromium measured; screenshots go
/// to a directory. If `nodes` is set, the page is asked for all nodes of the cluster until it shows that number.
pub fn capture(admin: SocketAddr, shots: &Path, nodes: Option<usize>) -> Vec<Value> {
    let captures = crate::process::run(
        Command::new("python3")
            .env("PYTHONPATH", crate::tool("python"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/src/page.py"))
            .arg(format!("http://{admin}/"))
            .arg(shots)
            .args(nodes.map(|nodes| nodes.to_string())),
    );
    captures.lines().map(|line| serde_json::from_str(line).expect("a line of JSON for each variant")).collect()
}
