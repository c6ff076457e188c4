//! The rate of many downloads under `[limits] upstream`.

use std::time::Duration;

use bytes::Bytes;
use dray_tests::dray::{Start, rule};
use dray_tests::http::client;
use dray_tests::image::digest;
use dray_tests::upstream::{Request, Response, TestUpstream};
use futures_util::StreamExt;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::rig::{clean, row};

const DOWNLOADS: usize = 200;
const BLOB_BYTES: usize = 64 << 20;

/// Time from the first request until the limit alone decides.
const BEGIN: Duration = Duration::from_secs(2);
const MEASURED: Duration = Duration::from_secs(10);

/// The same long body for each blob. No download ends while it is measured, so that no digest is compared.
fn respond(request: &Request, body: &Bytes) -> Response {
    match request.range() {
        Some(range) => {
            let (start, last) = (*range.start(), (*range.end()).min(BLOB_BYTES - 1));
            let part = body.slice(start..=last);
            Response::new(206, part).with("content-range", format!("bytes {start}-{last}/{BLOB_BYTES}"))
        }
        None => Response::new(200, body.clone()),
    }
}

pub(crate) async fn upstream() {
    let body = Bytes::from(vec![7; BLOB_BYTES]);
    let upstream = TestUpstream::with_handler(move |request| respond(request, &body)).await;
    let dir = tempfile::Builder::new().prefix("dray-bench").tempdir_in("/var/tmp").unwrap();
    for limit in [20, 200] {
        let config = format!("[limits]\nupstream = \"{limit}MiB/s\"\n{}", rule("docker.io", &upstream.url()));
        let dray = Start::new(config).cache(dir.path().join("cache")).disk("30GiB").run();
        let mut downloads = JoinSet::new();
        for nth in 0..DOWNLOADS {
            let path = format!("/v2/library/app{nth}/blobs/{}?ns=docker.io", digest(&nth.to_le_bytes()));
            let request = client().get(dray.url(&path)).send();
            downloads.spawn(async move {
                let mut body = request.await.unwrap().bytes_stream();
                while let Some(Ok(_)) = body.next().await {}
            });
        }
        sleep(BEGIN).await;
        let counted = async || dray.metric("dray_upstream_bytes_total{rule=\"docker.io\"}").await;
        let (began, before) = (Instant::now(), counted().await);
        sleep(MEASURED).await;
        let (after, seconds) = (counted().await, began.elapsed().as_secs_f64());
        #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = (after - before) as f64 / f64::from(1 << 20) / seconds;
        downloads.shutdown().await;
        row(
            &format!("{DOWNLOADS} downloads at once under a limit of {limit} MiB/s"),
            &format!("{rate:.1} MiB/s over {seconds:.0} s"),
            &format!("{:.3} x the limit", rate / f64::from(limit)),
            "0.95 to 1.05 x",
        );
        clean(dray);
    }
}
