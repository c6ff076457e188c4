//! Paging of lists: `Link` headers (RFC 8288) and their queries, which are opaque to dray.

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// Characters that are escaped in a header, such as a space that an upstream left raw.
const UNWRITABLE: &AsciiSet = &CONTROLS.add(b' ').add(b'<').add(b'>').add(b'"');

/// Longest query of a next page that is passed on, in bytes: clients send it in a request line. A longer one ends the
/// list.
const MAX_QUERY_BYTES: usize = 8 * 1024;

/// The query of the next page among all `Link` headers of a response.
///
/// Only the query counts: the client requests the same path again, with its own name for the repository.
pub fn next<'a>(values: impl Iterator<Item = &'a [u8]>) -> Option<String> {
    values.filter_map(|value| std::str::from_utf8(value).ok()).find_map(next_in_header)
}

/// One header may hold several links.
fn next_in_header(mut value: &str) -> Option<String> {
    loop {
        let (target, rest) = value[value.find('<')? + 1..].split_once('>')?;
        let end = end_of_parameters(rest);
        if is_next(&rest[..end]) {
            let query = target.split_once('?')?.1.split('#').next()?;
            return Some(utf8_percent_encode(query, UNWRITABLE).to_string())
                .filter(|query| query.len() <= MAX_QUERY_BYTES);
        }
        value = &rest[end..];
    }
}

/// Where the next link begins: at a comma outside quotes.
fn end_of_parameters(text: &str) -> usize {
    let mut quoted = false;
    let end = text.bytes().position(|byte| {
        quoted ^= byte == b'"';
        byte == b',' && !quoted
    });
    end.unwrap_or(text.len())
}

fn is_next(parameters: &str) -> bool {
    parameters.split(';').filter_map(|parameter| parameter.split_once('=')).any(|(name, value)| {
        let value = value.trim().trim_matches('"');
        name.trim().eq_ignore_ascii_case("rel")
            && value.split_whitespace().any(|relation| relation.eq_ignore_ascii_case("next"))
    })
}

/// A query without dray's own parameter `ns`. All others are the upstream's, whatever their names.
pub fn without_namespace(query: &str) -> String {
    let is_ours = |pair: &&str| url::form_urlencoded::parse(pair.as_bytes()).next().is_some_and(|(key, _)| key == "ns");
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.filter(|pair| !is_ours(pair)).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&str]) -> Option<String> {
        next(values.iter().map(|value| value.as_bytes()))
    }

    #[test]
    fn next_page_is_found_in_every_form() {
        for (values, want) in [
            (&["</v2/a/tags/list?last=a%2Bb&n=2>; rel=\"next\""][..], Some("last=a%2Bb&n=2")),
            (&["<https://x/v2/a/tags/list?n=2&next_page=gAAA%3D%3D>;rel=next"], Some("n=2&next_page=gAAA%3D%3D")),
            (&["<?nextToken=a/b>; title=\"x, y\"; rel=\"next\""], Some("nextToken=a/b")),
            (&["</x?p=0>; rel=\"prev\", </x?p=2>; rel=\"next\""], Some("p=2")),
            (&["</x?p=0>; rel=\"first\"", "</x?p=2>; REL=\"last next\""], Some("p=2")),
            (&["</x?p=2>; rel=\"prev\""], None),
            (&["</x>; rel=\"next\""], None),
            (&["garbage", "<"], None),
            (&["</x?a b\u{e9}>; rel=\"next\""], Some("a%20b%C3%A9")),
        ] {
            assert_eq!(of(values).as_deref(), want, "{values:?}");
        }
    }

    #[test]
    fn upstream_parameters_are_unchanged() {
        let of = without_namespace;
        assert_eq!(of("n=2&ns=docker.io&next_page=gAAA%3D%3D"), "n=2&next_page=gAAA%3D%3D");
        assert_eq!(of("continuationToken=a+b%20c&&n%73=x"), "continuationToken=a+b%20c");
        assert_eq!(of("ns=ghcr.io"), "");
    }
}
