//! Ranges on cache hits, on running downloads and on misses.

use dray_tests::dray::Start;
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::upstream::TestUpstream;

/// The cases of the conformance suite for a blob of any size: the range, and the expected bytes.
fn cases(total: usize) -> Vec<(String, Option<(usize, usize)>)> {
    vec![
        ("bytes=500-1499".into(), Some((500, 1500))),
        ("bytes=500-".into(), Some((500, total))),
        ("bytes=0-".into(), Some((0, total))),
        ("bytes=-500".into(), Some((total - 500, total))),
        (format!("bytes={}-{}", total - 100, total + 5000), Some((total - 100, total))),
        ("bytes=0-0".into(), Some((0, 1))),
        ("bytes=500-0".into(), None),
        (format!("bytes={}-{}", total + 5, total + 9), None),
        ("bytes=0-18446744073709551615".into(), Some((0, total))),
        (format!("bytes={total}-"), None),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_of_any_blob_cold_and_warm_are_exact() {
    let image = Image::new(1, &[2_000_000, 3000]);
    for layer in &image.layers {
        let bytes = &image.blobs[layer];
        for (range, want) in cases(bytes.len()) {
            let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
            let dray = Start::with_upstream("docker.io", &upstream.url()).run();
            let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
            for state in ["cold", "warm"] {
                let response = dray.get_range(&path, &range).await;
                let case = format!("{range} of {} bytes, {state}", bytes.len());
                match want {
                    Some((start, end)) => {
                        assert_eq!(response.status, 206, "{case}: {}", response.text());
                        assert!(response.body == bytes.slice(start..end), "{case}: wrong bytes");
                        let content_range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
                        assert_eq!(response.header("content-range"), Some(content_range.as_str()), "{case}");
                    }
                    None => {
                        assert_eq!(response.status, 416, "{case}");
                        let content_range = format!("bytes */{}", bytes.len());
                        assert_eq!(response.header("content-range"), Some(content_range.as_str()), "{case}");
                    }
                }
                let whole = dray.get(&path).await;
                assert!(whole.body == *bytes, "{case}: the whole afterwards");
                assert_eq!(whole.header("accept-ranges"), Some("bytes"));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn small_range_of_large_blob_does_not_download_it() {
    let image = Image::new(1, &[12_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let (layer, bytes) = image.layer();
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    for start in [5_000_000, 1_000_000, 11_000_000] {
        let response = dray.get_range(&path, &format!("bytes={start}-{}", start + 49_999)).await;
        assert_eq!((response.status, response.source()), (206, "upstream"));
        assert!(response.body == bytes.slice(start..start + 50_000));
    }
    assert_eq!(upstream.sent(), 150_000, "only the requested ranges");
    // A good share of the blob: now a full download is worthwhile.
    let response = dray.get_range(&path, "bytes=0-999999").await;
    assert!(response.body == bytes.slice(..1_000_000));
    let whole = dray.get(&path).await;
    assert!(whole.body == *bytes);
    dray.wait_for_fills().await;
    drop(upstream);
    assert_eq!(dray.get(&path).await.source(), "disk");
}

/// containerd 2.1.0 to 2.1.2 request manifests by range, and so does parallel layer fetch.
#[tokio::test(flavor = "multi_thread")]
async fn manifest_ranges_are_served() {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let url = dray.url("/v2/library/app/manifests/1?ns=docker.io");
    let response = get(&url, &[("range", "bytes=0-")]).await;
    assert_eq!((response.status, &response.body), (206, image.index()));
    let response = get(&url, &[("range", "bytes=10-19")]).await;
    assert_eq!((response.status, &response.body[..]), (206, &image.index()[10..20]));
}
