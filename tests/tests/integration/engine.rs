//! Blob downloads by ranges, by several connections, after failures, and from faulty upstreams.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use dray_tests::dray::{Dray, Start, rule};
use dray_tests::eventually;
use dray_tests::http::{client, get};
use dray_tests::image::{digest, noise};
use dray_tests::nginx::{Nginx, put_blob};
use dray_tests::upstream::{Fault, Request, Response, TestUpstream};

const MIB: usize = 1024 * 1024;
const SIZE: usize = 50 * MIB + 4321;

/// One blob for all tests of this module.
fn blob() -> &'static (String, Bytes) {
    static BLOB: OnceLock<(String, Bytes)> = OnceLock::new();
    BLOB.get_or_init(|| {
        let bytes = noise(42, SIZE);
        (digest(&bytes), bytes.into())
    })
}

fn path() -> String {
    format!("/v2/library/app/blobs/{}?ns=docker.io", blob().0)
}

/// The response of a correct upstream.
fn honest(request: &Request) -> Response {
    let bytes = &blob().1;
    let Some(start) = request.range_start() else { return Response::new(200, bytes.clone()) };
    let last = request.header("range").and_then(|range| range.rsplit('-').next()?.parse().ok()).unwrap_or(SIZE - 1);
    let last: usize = last.min(SIZE - 1);
    Response::new(206, bytes.slice(start..=last)).with("content-range", format!("bytes {start}-{last}/{SIZE}"))
}

async fn rig(handler: impl Fn(usize, &Request) -> Response + Send + Sync + 'static) -> (TestUpstream, Dray) {
    let count = AtomicUsize::new(0);
    let upstream =
        TestUpstream::with_handler(move |request| handler(count.fetch_add(1, Ordering::SeqCst), request)).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    (upstream, dray)
}

async fn assert_right(dray: &Dray) {
    let response = dray.get(&path()).await;
    assert_eq!((response.status, response.complete), (200, true));
    assert!(response.body == blob().1, "wrong bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_limiting_each_connection_gets_several() {
    let dir = tempfile::tempdir().unwrap();
    put_blob(dir.path(), "library/app", &blob().0, &blob().1);
    let nginx = Nginx::start(dir.path(), &["limit_rate 15m; sendfile_max_chunk 128k;"]).await;
    let dray = Start::with_upstream("docker.io", &nginx.url(0)).run();
    assert_right(&dray).await;
    let log = eventually("nginx has logged everything", async || {
        let log = nginx.log();
        (log.iter().map(|(_, bytes, _)| bytes).sum::<u64>() >= SIZE as u64).then_some(log)
    })
    .await;
    assert_eq!(log.iter().map(|(_, bytes, _)| bytes).sum::<u64>(), SIZE as u64, "{log:?}");
    assert!(log.len() > 4 && log.iter().all(|(status, ..)| *status == 206), "{log:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_without_ranges_is_requested_once() {
    let (upstream, dray) = rig(|_, _| Response::new(200, blob().1.clone())).await;
    assert_right(&dray).await;
    assert_eq!((upstream.requests().len(), upstream.sent()), (1, SIZE as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_with_broken_ranges_falls_back_to_one_stream() {
    type Botch = fn(usize, &Request) -> Response;
    let botches: [(&str, Botch); 5] = [
        ("another start", |_, request| match request.range_start() {
            Some(start) => {
                let range = format!("bytes {}-{}/{SIZE}", start + 1, start + 10);
                Response::new(206, blob().1.slice(start + 1..start + 11)).with("content-range", range)
            }
            None => honest(request),
        }),
        ("no Content-Range", |_, request| match request.range_start() {
            Some(start) => Response::new(206, blob().1.slice(start..start + 10)),
            None => honest(request),
        }),
        ("an error", |_, request| match request.range_start() {
            Some(_) => Response::new(501, ""),
            None => honest(request),
        }),
        ("only the first", |_, request| match request.range_start() {
            Some(0) | None => honest(request),
            Some(_) => Response::new(200, blob().1.clone()),
        }),
        ("another total later", |_, request| match request.range_start() {
            Some(0) | None => honest(request),
            Some(start) => {
                let range = format!("bytes {start}-{}/{}", start + 9, SIZE + 1);
                Response::new(206, blob().1.slice(start..start + 10)).with("content-range", range)
            }
        }),
    ];
    for (name, botch) in botches {
        let (upstream, dray) = rig(botch).await;
        let response = dray.get(&path()).await;
        assert!(
            response.complete && response.body == blob().1,
            "{name}: {} {:?}",
            response.status,
            upstream.requests().len()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn response_without_range_keeps_downloaded_bytes() {
    let (upstream, dray) = rig(|nth, request| match nth {
        2 => Response::new(200, blob().1.clone()).fault(Fault::CutAfter(MIB)),
        _ => honest(request),
    })
    .await;
    assert_right(&dray).await;
    assert!(upstream.sent() < (SIZE + 20 * MIB) as u64, "{} sent of {SIZE}", upstream.sent());
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_without_the_blob_corrupts_nothing() {
    let (_upstream, dray) = rig(|nth, request| match nth {
        1 => Response::new(404, ""),
        _ => honest(request),
    })
    .await;
    let first = dray.get(&path()).await;
    dray.wait_for_fills().await;
    if !first.complete {
        let from = first.body.len();
        let rest = dray.get_range(&path(), &format!("bytes={from}-")).await;
        assert_eq!((rest.status, rest.complete), (206, true), "the received bytes are right");
        assert!([&first.body[..], &rest.body[..]].concat() == blob().1[..]);
    }
    assert_eq!(dray.metric("dray_digest_mismatches_total").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_limiting_connections_is_not_retried_at_once() {
    let open = Arc::new(AtomicUsize::new(0));
    let counted = open.clone();
    let (upstream, dray) = rig(move |_, request| {
        if counted.fetch_add(1, Ordering::SeqCst) > 0 {
            return Response::new(429, "");
        }
        honest(request).fault(Fault::GateAfter(MIB))
    })
    .await;
    let url = dray.url(&path());
    let first = tokio::spawn(async move { dray_tests::http::get(&url, &[]).await });
    dray.wait_for_fill_start().await;
    let url = dray.url(&path());
    let second = tokio::spawn(async move { dray_tests::http::get(&url, &[("range", "bytes=40000000-")]).await });
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(upstream.requests().len() < 8, "{} requests", upstream.requests().len());
    open.store(0, Ordering::SeqCst);
    upstream.open_gate();
    first.abort();
    second.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn signed_url_expired_is_refreshed_once_for_all() {
    let fresh = Arc::new(AtomicUsize::new(0));
    let (signed, served) = (fresh.clone(), AtomicUsize::new(0));
    // The first signature is valid for two responses of the store.
    let store = TestUpstream::with_handler(move |request| {
        let expired = request.path.contains("signature=1") && served.fetch_add(1, Ordering::SeqCst) >= 2;
        if expired { Response::new(403, "expired") } else { honest(request) }
    })
    .await;
    let location = format!("{}/blob?signature=", store.url());
    let registry = TestUpstream::with_handler(move |_| {
        let nth = signed.fetch_add(1, Ordering::SeqCst) + 1;
        Response::new(307, "").with("location", format!("{location}{nth}"))
    })
    .await;
    let dray = Start::new(rule("docker.io", &registry.url()) + "\n[egress]\nallow_cidrs = [\"127.0.0.0/8\"]\n").run();
    assert_right(&dray).await;
    assert_eq!(fresh.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_received_before_a_failure_are_not_requested_again() {
    let healthy = Arc::new(AtomicBool::new(false));
    let well = healthy.clone();
    let (upstream, dray) = rig(move |nth, request| match nth {
        0 => honest(request).fault(Fault::CutAfter(12 * MIB)),
        _ if well.load(Ordering::SeqCst) => honest(request),
        _ => Response::new(503, ""),
    })
    .await;
    let response = dray.get(&path()).await;
    assert!(!response.complete && blob().1.starts_with(&response.body), "cut short, but no wrong byte");
    assert!(response.body.len() > 11 * MIB);
    dray.wait_for_fills().await;
    healthy.store(true, Ordering::SeqCst);
    assert_right(&dray).await;
    assert!(upstream.sent() < (SIZE + MIB) as u64, "{} sent of {SIZE}", upstream.sent());
    assert!(dray.metric("dray_resumed_bytes_total").await > 11 * MIB as u64);
}

/// A dray that was ended by `restart` when it had downloaded more than 36 MiB of the blob.
async fn restarted_during_download(restart: impl FnOnce(Dray) -> Dray) -> (TestUpstream, Dray) {
    let (upstream, dray) = rig(|_, request| {
        let response = honest(request);
        let ends_late = request.range_start().is_some_and(|start| start + response.body.len() > 42 * MIB);
        if ends_late { response.fault(Fault::GateAfter(0)) } else { response }
    })
    .await;
    tokio::spawn(client().get(dray.url(&path())).send());
    let written = async || {
        let status = get(&format!("http://{}/api/v1/status", dray.admin), &[]).await;
        let status: serde_json::Value = serde_json::from_slice(&status.body).unwrap();
        status["downloads"][0]["written_bytes"].as_u64()
    };
    eventually("most of it is written", async || written().await.filter(|bytes| *bytes > 36 * MIB as u64)).await;
    let dray = restart(dray);
    upstream.open_gate();
    (upstream, dray)
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_download_survives_a_kill() {
    assert_resumed(Dray::kill_and_restart).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_download_survives_an_orderly_restart() {
    assert_resumed(Dray::interrupt_and_restart).await;
}

async fn assert_resumed(restart: impl FnOnce(Dray) -> Dray) {
    let (_upstream, dray) = restarted_during_download(restart).await;
    assert_right(&dray).await;
    let resumed = dray.metric("dray_resumed_bytes_total").await;
    assert!(resumed >= 32 * MIB as u64, "{resumed} bytes were kept");
    let received = dray.metric("dray_upstream_bytes_total{rule=\"docker.io\"}").await;
    assert_eq!(received, SIZE as u64 - resumed, "only the rest is requested");
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_rest_of_a_killed_process_is_found() {
    let (_upstream, dray) = restarted_during_download(Dray::kill_and_restart).await;
    let drafts = fs::read_dir(dray.start().cache_dir().join("v1/fills")).unwrap().map(|file| file.unwrap().path());
    let draft = { drafts }.find(|path| path.extension().is_none()).expect("the draft of the killed process");
    File::options().write(true).open(draft).unwrap().write_all_at(b"wrong", 7).unwrap();
    let response = dray.get(&path()).await;
    assert!(!response.complete, "a wrong byte is not sent whole");
    dray.wait_for_fills().await;
    assert_right(&dray).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_blob_is_downloaded_anew_by_one_stream() {
    let (upstream, dray) = rig(|nth, request| match nth {
        0 => honest(request).flipped(5 * MIB),
        _ => honest(request),
    })
    .await;
    let response = dray.get(&path()).await;
    assert!(!response.complete, "a wrong byte is not sent whole");
    dray.wait_for_fills().await;
    let resumed = dray.get_range(&path(), "bytes=1000000-").await;
    assert_eq!(resumed.status, 404, "a correct end must not complete a corrupt start");
    let before = upstream.requests().len();
    assert_right(&dray).await;
    let after = upstream.requests().split_off(before);
    assert_eq!(after.iter().map(Request::range_start).collect::<Vec<_>>(), [None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn range_far_into_a_cold_blob_does_not_wait_for_its_start() {
    let start = 40 * MIB;
    let (upstream, dray) = rig(move |_, request| {
        let response = honest(request);
        if request.range_start().is_none_or(|from| from < start) {
            response.fault(Fault::GateAfter(0))
        } else {
            response
        }
    })
    .await;
    let response = dray.get_range(&path(), &format!("bytes={start}-{}", SIZE - 100_000)).await;
    assert_eq!((response.status, response.complete), (206, true));
    assert!(response.body == blob().1[start..=SIZE - 100_000], "wrong bytes");
    upstream.open_gate();
    assert_right(&dray).await;
    assert_eq!(upstream.sent(), SIZE as u64, "each byte is downloaded once");
}

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_fill_stops_or_finishes_as_configured() {
    for (on_client_abort, completes) in [("stop", false), ("finish", true)] {
        let upstream = TestUpstream::with_handler(|request| honest(request).fault(Fault::SlowUntilGate(300_000))).await;
        let config = rule("docker.io", &upstream.url()) + &format!("on_client_abort = \"{on_client_abort}\"\n");
        let dray = Start::new(config).run();
        drop(client().get(dray.url(&path())).send().await.unwrap());
        if completes {
            tokio::time::sleep(Duration::from_secs(7)).await;
            upstream.open_gate();
            dray.wait_for_fills().await;
            assert_eq!(dray.get(&path()).await.source(), "disk");
        } else {
            dray.wait_for_fills().await;
            let sent = upstream.sent();
            assert!(sent < 20 * MIB as u64, "{sent}");
            upstream.open_gate();
            assert_right(&dray).await;
            assert!(dray.metric("dray_resumed_bytes_total").await > MIB as u64);
        }
    }
}
