//! Support for the integration tests: real registries and clients, a hostile upstream, DNS, TLS.

pub mod callgrind;
pub mod chart;
pub mod cluster;
pub mod containerd;
pub mod dns;
pub mod documents;
pub mod dray;
pub mod held_disk;
pub mod host;
pub mod http;
pub mod image;
pub mod kubernetes;
pub mod mount;
pub mod nginx;
pub mod node;
pub mod packages;
pub mod page;
pub mod process;
pub mod registry;
pub mod tls;
pub mod tokens;
pub mod upstream;

use std::path::{Path, PathBuf};

/// Waits for an effect of another process. Panics after 30 s.
pub async fn eventually<T>(what: &str, probe: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(std::time::Duration::from_secs(30), what, probe).await
}

/// The same with another limit.
pub async fn eventually_within<T>(
    limit: std::time::Duration,
    what: &str,
    mut probe: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = std::time::Instant::now() + limit;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(std::time::Instant::now() < deadline, "still waiting after {limit:?}: {what}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// The directory that `cargo` builds into for this profile.
pub fn build_dir() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    let dir = program.parent().expect("a program lies in a directory");
    // Tests are in <profile>/deps, programs in <profile>.
    let profile = if dir.ends_with("deps") { dir.parent() } else { Some(dir) };
    profile.expect("cargo's layout").to_owned()
}

/// The folder of the project.
pub fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// A Go tool built by `make tools`.
pub fn tool(name: &str) -> PathBuf {
    let path = project().join("target/tools").join(name);
    assert!(path.exists(), "{} is missing: run `make tools`", path.display());
    path
}
