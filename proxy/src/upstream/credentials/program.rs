//! Programs that know secrets: asked on standard input, they answer on standard output.

use std::path::Path;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

use crate::times::STALL_TIMEOUT;

/// More than any answer is long, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;

/// What a program said.
pub(super) struct ProgramOutput {
    pub(super) status: ExitStatus,
    pub(super) output: Vec<u8>,
}

/// Runs a program to its end. An error never holds what it said, which may be a secret.
pub(super) async fn ask(mut command: Command, name: &Path, question: &[u8]) -> Result<ProgramOutput, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", name.display());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    let talk = async {
        // One that reads nothing may have gone already; then its status tells.
        if let Some(mut input) = child.stdin.take() {
            let _ = input.write_all(question).await;
        }
        let mut output = Vec::new();
        if let Some(answer) = child.stdout.take() {
            answer.take(MAX_ANSWER).read_to_end(&mut output).await?;
        }
        Ok(ProgramOutput { status: child.wait().await?, output })
    };
    match timeout(STALL_TIMEOUT, talk).await {
        Ok(said) => said.map_err(failed),
        Err(_) => Err(format!("{}: no answer within {} s", name.display(), STALL_TIMEOUT.as_secs())),
    }
}
