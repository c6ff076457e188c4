//! Debian's docker-registry: without authentication, with a password, with tokens, with TLS.

use std::path::Path;
use std::process::{Command, Stdio};

use reqwest::Method;
use tempfile::TempDir;

use crate::eventually;
use crate::http::client;
use crate::image::Image;
use crate::process::{Process, free_port};

/// A running docker-registry.
pub struct Registry {
    pub port: u16,
    process: Option<Process>,
    /// A second registry on the same storage, without authentication, to push to.
    push_port: u16,
    _push: Process,
    dir: TempDir,
    settings: String,
}

impl Registry {
    pub async fn open() -> Self {
        Self::with("").await
    }

    /// With additional YAML: `auth:` and `http: tls:` sections.
    pub async fn with(settings: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (port, push_port) = (free_port(), free_port());
        let push = serve(dir.path(), "push", push_port, "");
        let process = Some(serve(dir.path(), "main", port, settings));
        let registry = Self { port, process, push_port, _push: push, dir, settings: settings.to_owned() };
        for port in [port, push_port] {
            listening(port).await;
        }
        registry
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The folder of its content.
    pub fn storage(&self) -> std::path::PathBuf {
        self.dir.path().join("storage")
    }

    /// Stops the registry.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts the registry again on the same port.
    pub async fn start(&mut self) {
        self.process = Some(serve(self.dir.path(), "main", self.port, &self.settings));
        listening(self.port).await;
    }

    /// Pushes an image under a tag.
    pub async fn push(&self, repository: &str, tag: &str, image: &Image) {
        let base = format!("http://127.0.0.1:{}/v2/{repository}", self.push_port);
        let client = client();
        for (digest, bytes) in &image.blobs {
            let begun = client.post(format!("{base}/blobs/uploads/")).send().await.expect("an upload begins");
            let location = begun.headers()["location"].to_str().expect("a location").to_owned();
            let separator = if location.contains('?') { '&' } else { '?' };
            let put = client.put(format!("{location}{separator}digest={digest}")).body(bytes.clone()).send().await;
            assert_eq!(put.expect("an upload ends").status(), 201);
        }
        let index = (&image.digest, &image.manifests[&image.digest]);
        let others = image.manifests.iter().filter(|(digest, _)| **digest != image.digest);
        for (digest, (media_type, bytes)) in others.chain([index]) {
            let reference = if *digest == image.digest { tag } else { digest };
            let put = client
                .request(Method::PUT, format!("{base}/manifests/{reference}"))
                .header("content-type", media_type)
                .body(bytes.clone())
                .send()
                .await;
            assert_eq!(put.expect("a manifest is put").status(), 201);
        }
    }
}

/// An `auth:` section for htpasswd. The file holds bcrypt hashes from the real tool.
pub fn htpasswd(dir: &Path, username: &str, password: &str) -> String {
    let file = dir.join("htpasswd");
    let line = crate::process::run(Command::new("htpasswd").args(["-nbB", username, password]));
    std::fs::write(&file, line).expect("the password file is written");
    format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display())
}

fn serve(dir: &Path, name: &str, port: u16, settings: &str) -> Process {
    let config = dir.join(format!("{name}.yml"));
    let storage = dir.join("storage");
    let http = if settings.contains("ADDR") {
        settings.replace("ADDR", &format!("127.0.0.1:{port}"))
    } else {
        format!("{settings}http: {{addr: 127.0.0.1:{port}}}\n")
    };
    let yaml = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}, redirect: {{disable: true}}}}\n{http}",
        storage.display()
    );
    std::fs::write(&config, yaml).expect("the configuration is written");
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::null());
    Process::spawn(&mut command)
}

async fn listening(port: u16) {
    eventually("docker-registry listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok())
        .await;
}
