//! Memory, idle and with many slow readers.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::rig::{Rig, Server, clean, curl, resident, row};

pub(crate) async fn memory(rig: &Rig) {
    let dray = rig.dray(Server::Fast);
    tokio::time::sleep(Duration::from_secs(1)).await;
    row("memory, idle", &format!("{} MiB", resident(dray.id()) >> 20), "16 MiB memory tier", "<= tier + 64 MiB");
    // During a download the bytes pass through this process; cached blobs are sent by sendfile.
    curl(&dray.url(&rig.path()));
    dray.wait_for_fills().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = resident(dray.id());
    let mut readers = Vec::new();
    for _ in 0..500 {
        let mut stream = TcpStream::connect(dray.registry).await.unwrap();
        let request = format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", rig.path());
        stream.write_all(request.as_bytes()).await.unwrap();
        readers.push(stream);
    }
    let mut most = 0;
    let mut buffer = vec![0; 16 * 1024];
    for _ in 0..20 {
        for reader in &mut readers {
            reader.read_exact(&mut buffer).await.unwrap();
        }
        most = most.max(resident(dray.id()));
    }
    let added = most.saturating_sub(before) >> 20;
    row("memory, 500 slow readers add", &format!("{added} MiB"), "", "<= 64 MiB");
    drop(readers);
    clean(dray);
}
