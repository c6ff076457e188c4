//! Lazy snapshotters: requests of stargz-snapshotter, soci-snapshotter and nydusd to a mirror. None of their released
//! versions names the registry.

use dray_tests::dray::{Dray, Start};
use dray_tests::http::{ClientResponse, get, head};
use dray_tests::image::Image;
use dray_tests::upstream::{Request, TestUpstream};

async fn rig() -> (TestUpstream, Dray, Image) {
    let image = Image::new(1, &[12_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    (upstream, dray, image)
}

fn url(dray: &Dray, image: &Image) -> String {
    dray.url(&format!("/v2/library/app/blobs/{}", image.layer().0))
}

async fn read(url: &str, range: &str) -> ClientResponse {
    get(url, &[("range", range), ("accept-encoding", "identity")]).await
}

/// The parts of a multipart response: Content-Range and bytes.
fn parts(response: &ClientResponse) -> Vec<(String, Vec<u8>)> {
    let media_type = response.header("content-type").unwrap();
    let boundary = media_type.strip_prefix("multipart/byteranges; boundary=").expect("a multipart response");
    let find = |bytes: &[u8], what: &str| bytes.windows(what.len()).position(|window| window == what.as_bytes());
    let (open, mut rest, mut found) = (format!("\r\n--{boundary}\r\n"), &response.body[..], Vec::new());
    while rest.starts_with(open.as_bytes()) {
        rest = &rest[open.len()..];
        let end_of_head = find(rest, "\r\n\r\n").expect("a head");
        let head = std::str::from_utf8(&rest[..end_of_head]).unwrap();
        let range = head.lines().find_map(|line| line.strip_prefix("Content-Range: ")).unwrap().to_owned();
        rest = &rest[end_of_head + 4..];
        let length = find(rest, &format!("\r\n--{boundary}")).expect("a boundary after each part");
        found.push((range, rest[..length].to_vec()));
        rest = &rest[length..];
    }
    assert_eq!(rest, format!("\r\n--{boundary}--\r\n").as_bytes());
    found
}

/// A probe of two bytes for redirects, HEAD for the size, chunks of about 50,000 bytes, several in one request, and the
/// probe again each minute.
#[tokio::test(flavor = "multi_thread")]
async fn stargz_reads_chunks_by_several_ranges() {
    let (upstream, dray, image) = rig().await;
    let (url, bytes) = (url(&dray, &image), image.layer().1);
    let total = bytes.len();
    let probe = read(&url, "bytes=0-1").await;
    assert_eq!((probe.status, &probe.body[..]), (206, &bytes[..2]));
    let size = head(&url).await;
    assert_eq!((size.status, size.header("content-length")), (200, Some(&*total.to_string())));
    let chunks = [(100_000, 150_000), (6_000_000, 6_050_000), (11_000_000, 11_050_000), (0, 2)];
    let range: Vec<String> = chunks.iter().map(|(start, end)| format!("{start}-{}", end - 1)).collect();
    let range = format!("bytes={}", range.join(","));
    for state in ["cold", "warm"] {
        let response = read(&url, &range).await;
        assert_eq!((response.status, response.complete), (206, true), "{state}");
        assert_eq!(response.header("content-length"), Some(&*response.body.len().to_string()));
        assert_eq!((response.header("content-range"), response.header("accept-ranges")), (None, Some("bytes")));
        let parts = parts(&response);
        assert_eq!(parts.len(), chunks.len(), "{state}");
        for ((range, body), (start, end)) in parts.iter().zip(chunks) {
            assert_eq!(*range, format!("bytes {start}-{}/{total}", end - 1));
            assert!(body[..] == bytes[start..end], "{state}: wrong bytes of {range}");
        }
        if state == "cold" {
            assert_eq!(upstream.sent(), 150_004, "only the requested ranges");
            assert!(dray.get(&format!("/v2/library/app/blobs/{}", image.layer().0)).await.complete);
            dray.wait_for_fills().await;
        }
    }
    assert_eq!(read(&url, "bytes=0-1").await.body[..], bytes[..2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn range_set_meaning_one_range_or_none_is_reduced() {
    let (_upstream, dray, image) = rig().await;
    let (url, bytes) = (url(&dray, &image), image.layer().1);
    let total = bytes.len();
    for state in ["cold", "warm"] {
        for (range, start, end) in
            [("bytes=0-99,100-199", 0, 200), ("bytes=50-59,99000000-", 50, 60), ("bytes=99000000-,50-59", 50, 60)]
        {
            let response = read(&url, range).await;
            assert_eq!(response.status, 206, "{state}: {range}: {}", response.text());
            assert_eq!(response.header("content-range"), Some(&*format!("bytes {start}-{}/{total}", end - 1)));
            assert!(response.body[..] == bytes[start..end]);
        }
        let response = read(&url, "bytes=99000000-,5-2").await;
        assert_eq!((response.status, response.header("content-range")), (416, Some(&*format!("bytes */{total}"))));
        // A repeated range is sent once.
        let again = format!("bytes=0-{}", ",0-".repeat(200));
        assert_eq!(read(&url, &again).await.body.len(), total);
        dray.wait_for_fills().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_unsatisfiable_ranges_cause_few_requests() {
    let (upstream, dray, image) = rig().await;
    let ranges = (0..200).map(|nth| format!("{}-", 900_000_000 + nth)).collect::<Vec<_>>().join(",");
    let response = read(&url(&dray, &image), &format!("bytes={ranges}")).await;
    assert_eq!(response.status, 416);
    assert!(upstream.requests().len() <= 4, "{}", upstream.requests().len());
}

/// Spans of 4 MiB and a parallel mode with many connections; it insists on Accept-Ranges.
#[tokio::test(flavor = "multi_thread")]
async fn soci_reads_spans_on_many_connections() {
    let (upstream, dray, image) = rig().await;
    let (url, bytes) = (url(&dray, &image), image.layer().1.clone());
    let total = bytes.len();
    let span = 1 << 20;
    let reads = (0..total.div_ceil(span)).map(|nth| {
        let (url, bytes) = (url.clone(), bytes.clone());
        tokio::spawn(async move {
            let (start, end) = (nth * span, ((nth + 1) * span).min(total));
            let response = read(&url, &format!("bytes={start}-{}", end - 1)).await;
            assert_eq!((response.status, response.header("accept-ranges")), (206, Some("bytes")));
            assert!(response.body[..] == bytes[start..end], "wrong bytes of span {nth}");
        })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap();
    }
    dray.wait_for_fills().await;
    assert!(upstream.sent() <= 2 * total as u64, "{} bytes of {total}", upstream.sent());
    drop(upstream);
    assert_eq!(read(&url, "bytes=0-1048575").await.source(), "disk");
}

/// HEAD for the size, single ranges of up to 1 MiB, and streaming reads of the rest.
#[tokio::test(flavor = "multi_thread")]
async fn nydusd_reads_single_ranges_and_streams() {
    let (upstream, dray, image) = rig().await;
    let (url, bytes) = (url(&dray, &image), image.layer().1);
    let total = bytes.len();
    let size = head(&url).await;
    assert_eq!(
        (size.header("content-length"), size.header("accept-ranges")),
        (Some(&*total.to_string()), Some("bytes"))
    );
    let response = read(&url, "bytes=5000000-5262143").await;
    assert!(response.status == 206 && response.body[..] == bytes[5_000_000..5_262_144]);
    assert_eq!(upstream.requests().iter().filter(|request| request.method == "GET").count(), 1, "one round trip");
    let response = read(&url, "bytes=11000000-").await;
    assert!(response.status == 206 && response.complete && response.body[..] == bytes[11_000_000..]);
    let starts: Vec<_> = upstream.requests().iter().filter_map(Request::range_start).collect();
    assert_eq!(starts[1], 11_000_000, "the requested range is downloaded first");
}

#[tokio::test(flavor = "multi_thread")]
async fn reader_that_closes_early_disturbs_no_other() {
    let (_upstream, dray, image) = rig().await;
    let url = url(&dray, &image);
    for range in ["bytes=0-", "bytes=1000-2000,5000000-6000000", "bytes=2000000-9000000"] {
        let client = dray_tests::http::client();
        drop(client.get(&url).header("range", range).send().await.unwrap());
    }
    let whole = dray.get(&format!("/v2/library/app/blobs/{}", image.layer().0)).await;
    assert!(whole.complete && whole.body == image.layer().1);
}
