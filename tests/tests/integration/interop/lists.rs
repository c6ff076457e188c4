//! Queries and paging tokens of lists are opaque and belong to the upstream.

use dray_tests::upstream::{Request, Response, TestUpstream};
use serde_json::json;

use super::{FORMS, dray_of};

/// Pages with an opaque token for the next page, in the given parameter.
fn page(request: &Request, parameter: &str) -> Response {
    let query = request.path.split_once('?').map_or("", |(_, query)| query);
    let at = query.split('&').find_map(|pair| pair.strip_prefix(&format!("{parameter}="))).unwrap_or("0");
    // The token must come back byte for byte: upstreams sign their tokens.
    let at: u32 = match at {
        "0" => 0,
        token => token
            .strip_prefix("gA%2FA")
            .and_then(|rest| rest.strip_suffix("%3D%3D"))
            .map_or(99, |nth| nth.parse().unwrap()),
    };
    let response = Response::new(200, json!({"name": "a/app", "tags": [format!("v{at}")]}).to_string());
    match at {
        0..3 => {
            response.with("link", format!("</v2/a/app/tags/list?n=1&{parameter}=gA%2FA{}%3D%3D>; rel=\"next\"", at + 1))
        }
        3 => response,
        _ => Response::new(400, r#"{"errors":[{"code":"PAGINATION_NUMBER_INVALID"}]}"#),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn list_with_any_paging_style_returns_all_pages() {
    for parameter in ["last", "next_page", "nextToken", "continuationToken", "cursor[after]"] {
        let upstream = TestUpstream::with_handler(move |request| page(request, parameter)).await;
        let dray = dray_of(&upstream);
        for form in FORMS {
            let (mut path, mut tags) = (form.path("tags/list?n=1"), Vec::new());
            loop {
                let response = dray.get(&path).await;
                assert_eq!(response.status, 200, "{parameter} {form:?} {path}: {}", response.text());
                let list: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
                tags.push(list["tags"][0].as_str().unwrap().to_owned());
                let Some(link) = response.header("link") else { break };
                path = link.trim_start_matches('<').split('>').next().unwrap().to_owned();
            }
            assert_eq!(tags, ["v0", "v1", "v2", "v3"], "{parameter} {form:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn list_with_unknown_parameters_passes_them_unchanged() {
    let upstream = TestUpstream::with_handler(|_| Response::new(200, r#"{"name":"a/app","tags":[]}"#)).await;
    let dray = dray_of(&upstream);
    for form in FORMS {
        dray.get(&form.path("tags/list?n=2&pageToken=a+b%2Fc&orderby=timedesc")).await;
        let request = upstream.requests().pop().unwrap();
        assert_eq!(request.path, "/v2/a/app/tags/list?n=2&pageToken=a+b%2Fc&orderby=timedesc");
    }
}

/// Artifact Registry sends all tags in one page.
#[tokio::test(flavor = "multi_thread")]
async fn list_of_nine_megabytes_is_passed_on() {
    let tags: Vec<String> = (0..100_000).map(|nth| format!("release-2026-11-29-{nth:06}-{:064x}", nth * 77)).collect();
    let list = json!({"name": "a/app", "tags": tags}).to_string();
    assert!(list.len() > 9_000_000);
    let body = list.clone();
    let upstream = TestUpstream::with_handler(move |_| Response::new(200, body.clone()).chunked()).await;
    let dray = dray_of(&upstream);
    for form in FORMS {
        let lists = (0..16).map(|_| async { dray.get(&form.path("tags/list")).await });
        for response in futures_util::future::join_all(lists).await {
            assert_eq!((response.status, response.complete), (200, true));
            assert!(response.body == list, "{} bytes", response.body.len());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn catalog_of_a_named_registry_is_passed_on() {
    let upstream = TestUpstream::with_handler(|request| match request.path.starts_with("/v2/_catalog") {
        true => Response::new(200, r#"{"repositories":["a/app"]}"#)
            .with("link", "</v2/_catalog?n=1&last=a%2Fapp>; rel=\"next\""),
        false => Response::new(404, ""),
    })
    .await;
    let dray = dray_of(&upstream);
    for path in ["/v2/_catalog?n=1&ns=reg.example", "/v2/_catalog?n=1"] {
        let response = dray.get(path).await;
        assert_eq!((response.status, response.text().as_str()), (200, r#"{"repositories":["a/app"]}"#), "{path}");
        let link = response.header("link").unwrap();
        assert!(link.starts_with("</v2/_catalog?n=1&last=a%2Fapp"), "{link}");
    }
    assert_eq!(upstream.requests()[0].path, "/v2/_catalog?n=1");
}
