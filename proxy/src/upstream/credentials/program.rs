//! Credential programs: the request goes to their standard input, the response comes from their standard output.

use std::path::Path;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

use crate::times::STALL_TIMEOUT;

/// Bytes of output that are read. A longer output is cut off and is not valid.
const MAX_OUTPUT_BYTES: u64 = 64 * 1024;

pub(super) struct ProgramOutput {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
}

/// Runs a program to its end. An error never contains its output, which may be a secret.
pub(super) async fn run(mut command: Command, name: &Path, request: &[u8]) -> Result<ProgramOutput, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", name.display());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    let talk = async {
        // A program that reads no input may have exited already; its status decides.
        if let Some(mut input) = child.stdin.take() {
            let _ = input.write_all(request).await;
        }
        let mut stdout = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            pipe.take(MAX_OUTPUT_BYTES).read_to_end(&mut stdout).await?;
        }
        Ok(ProgramOutput { status: child.wait().await?, stdout })
    };
    match timeout(STALL_TIMEOUT, talk).await {
        Ok(output) => output.map_err(failed),
        Err(_) => Err(format!("{}: no response within {} s", name.display(), STALL_TIMEOUT.as_secs())),
    }
}
