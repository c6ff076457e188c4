//! The `WWW-Authenticate` challenges of upstreams.

use percent_encoding::{AsciiSet, percent_decode_str, percent_encode};
use url::Url;

/// A challenge that dray supports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    /// A token has to be requested (the distribution project's token specification).
    Bearer {
        realm: Url,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// Escapes a header line before it is parsed, so that the bytes of each value can be restored.
const ESCAPED: &AsciiSet = &AsciiSet::EMPTY.add(b'%');

/// Largest challenge that is used, in bytes, since one is remembered for each repository. A larger one is ignored.
const MAX_CHALLENGE_BYTES: usize = 2048;

impl Challenge {
    /// Picks the strongest supported challenge of all header lines. One line may hold several challenges. As for Go's
    /// clients, bytes outside ASCII in the realm are percent-encoded, and the last one of repeated parameters counts.
    pub fn pick<'a>(lines: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let mut basic = None;
        for line in lines {
            let line = percent_encode(line, ESCAPED).to_string();
            for challenge in http_auth::parser::ChallengeParser::new(&line).map_while(Result::ok) {
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let param = |name: &str| {
                        let value = challenge.params.iter().rfind(|(key, _)| key.eq_ignore_ascii_case(name));
                        value.map(|(_, value)| percent_decode_str(&value.to_unescaped()).collect::<Vec<u8>>())
                    };
                    let (realm, service, scope) = (param("realm"), param("service"), param("scope"));
                    if [&realm, &service, &scope].into_iter().flatten().map(Vec::len).sum::<usize>()
                        > MAX_CHALLENGE_BYTES
                    {
                        continue;
                    }
                    let realm = realm.map(|realm| percent_encode(&realm, &AsciiSet::EMPTY).to_string());
                    if let Some(realm) = realm.and_then(|realm| Url::parse(&realm).ok()) {
                        let (service, scope) = (service.map(text), scope.map(text));
                        return Some(Self::Bearer { realm, service, scope });
                    }
                }
            }
        }
        basic
    }
}

/// UTF-8, else Latin-1, the former encoding of header values.
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| error.as_bytes().iter().copied().map(char::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_is_preferred_in_any_order() {
        let bearer = r#"Bearer realm="https://auth.io/token",service="reg, io",scope="repository:a/b:pull""#;
        for lines in [
            vec![bearer],
            vec!["Basic realm=\"x\"", bearer],
            vec![
                "Basic realm=\"x\", Bearer realm=\"https://auth.io/token\",service=\"reg, io\",scope=\"repository:a/b:pull\"",
            ],
        ] {
            let Some(Challenge::Bearer { realm, service, scope }) =
                Challenge::pick(lines.into_iter().map(str::as_bytes))
            else {
                panic!("no bearer");
            };
            assert_eq!(realm.as_str(), "https://auth.io/token");
            assert_eq!(service.as_deref(), Some("reg, io"));
            assert_eq!(scope.as_deref(), Some("repository:a/b:pull"));
        }
    }

    #[test]
    fn unsupported_challenge_is_none() {
        let pick = |lines: &[&str]| Challenge::pick(lines.iter().map(|line| line.as_bytes()));
        assert_eq!(pick(&["Negotiate", "Digest realm=\"x\""]), None);
        assert_eq!(pick(&["Bearer realm=\"not a url\""]), None);
        assert_eq!(pick(&["Basic"]), Some(Challenge::Basic));
        assert_eq!(pick(&["\u{1}\u{2}, = ,,"]), None);
        let long = format!("Bearer realm=\"https://auth.io/\",service=\"{}\"", "x".repeat(MAX_CHALLENGE_BYTES));
        assert_eq!(pick(&[&*long]), None);
        assert_eq!(pick(&[&*long, "Basic"]), Some(Challenge::Basic));
    }

    #[test]
    fn challenge_keeps_bytes_and_last_parameter() {
        let line = b"Bearer realm=\"https://auth.io/caf\xe9\",service=\"reg\"";
        let Some(Challenge::Bearer { realm, .. }) = Challenge::pick([&line[..]].into_iter()) else {
            panic!("no bearer")
        };
        assert_eq!(realm.as_str(), "https://auth.io/caf%E9");
        let line = "Bearer realm=\"https://auth.io/a%2Fb\",service=\"caf\u{e9} %41\",scope=\"a\",scope=\"b\"";
        let Some(Challenge::Bearer { realm, service, scope }) = Challenge::pick([line.as_bytes()].into_iter()) else {
            panic!("no bearer")
        };
        assert_eq!(realm.as_str(), "https://auth.io/a%2Fb");
        assert_eq!((service.as_deref(), scope.as_deref()), (Some("caf\u{e9} %41"), Some("b")));
        assert_eq!(Challenge::pick([&b"Basic realm=\"caf\xe9\""[..]].into_iter()), Some(Challenge::Basic));
    }
}
