//! The packages of a release, made from the program under test.

use std::path::Path;
use std::process::Command;

use crate::dray::binary;
use crate::process::run;
use crate::project;

/// Makes the archive and the packages for amd64.
pub fn make_packages(version: &str, out: &Path) {
    let script = project().join("release/packages.sh");
    run(Command::new(script).arg(binary()).args(["amd64", version]).arg(out).env("SOURCE_DATE_EPOCH", "1700000000"));
}
