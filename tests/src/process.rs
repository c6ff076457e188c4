//! Child processes that are killed at the end of their test.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// A child process, killed when dropped.
pub struct Process {
    child: Child,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Self {
        let name = command.get_program().to_owned();
        let child = command.stdin(Stdio::null()).spawn();
        Self { child: child.unwrap_or_else(|e| panic!("{}: {e}; run `make setup`", Path::new(&name).display())) }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")).expect("a pid");
        kill_process(pid, signal).expect("the process runs");
    }

    /// Kills with SIGKILL and waits.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("the process was started")
    }

    /// The first output line that begins with `prefix`. Later output is discarded.
    pub fn line(&mut self, prefix: &'static str) -> String {
        let stdout = self.child.stdout.take().expect("stdout is piped");
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            if let Some(line) = lines.by_ref().find(|line| line.starts_with(prefix)) {
                let _ = sender.send(line);
            }
            lines.for_each(drop);
        });
        match receiver.recv_timeout(Duration::from_secs(30)) {
            Ok(line) => line,
            Err(_) => panic!("no line \"{prefix}...\"; exit status {:?}", self.child.try_wait()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end; panics unless it succeeds.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs a command to its end and returns its result, also after a failure.
pub fn output(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output();
    output.unwrap_or_else(|e| panic!("{command:?}: {e}; run `make setup`"))
}

/// A port that is free now, for programs that cannot use port 0. It is below the range of outgoing connections, so that
/// the kernel does not assign it meanwhile. Each port is returned once.
pub fn free_port() -> u16 {
    static RETURNED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut returned = RETURNED.lock().expect("no test panicked");
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok() && returned.insert(*port);
    let mut candidates = std::iter::repeat_with(|| fastrand::u16(10_000..32_000));
    candidates.find(free).expect("a free port")
}
