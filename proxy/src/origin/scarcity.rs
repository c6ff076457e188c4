//! How many pulls registries still allow, as they last said. What nobody waits for is put off while few are left.

use std::time::Duration;

use ::http::HeaderMap;
use tokio::time::Instant;

/// By rule and upstream, since a rule says with which credentials is asked.
pub(super) struct Scarcity(moka::sync::Cache<(String, String), Left>);

#[derive(Clone, Copy)]
struct Left {
    remaining: i64,
    limit: i64,
    said: Instant,
    /// Pulls are counted over this time.
    window: Duration,
}

const LIMIT: &str = "ratelimit-limit";
const REMAINING: &str = "ratelimit-remaining";

/// Few: less than one in so many.
const FEW: i64 = 4;

/// A registry that does not say is taken to count over an hour.
const UNSAID: Duration = Duration::from_secs(3600);

/// Whatever it says.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl Scarcity {
    pub(super) fn new() -> Self {
        Self(moka::sync::Cache::new(1_000))
    }

    /// An answer of an upstream. Returns the limit and what is left of it, where it says so.
    pub(super) fn heard(
        &self,
        rule: &str,
        upstream: &str,
        headers: &HeaderMap,
        now: Instant,
    ) -> (Option<i64>, Option<i64>) {
        let (limit, remaining) = (number(headers, LIMIT), number(headers, REMAINING));
        if let (Some((limit, window)), Some((remaining, _))) = (limit, remaining) {
            let left = Left { remaining, limit, said: now, window: window.unwrap_or(UNSAID).min(LONGEST) };
            self.0.insert((rule.to_owned(), upstream.to_owned()), left);
        }
        (limit.map(|(limit, _)| limit), remaining.map(|(remaining, _)| remaining))
    }

    /// Whether few are left. Some come back with time, so that after a part of the window one may ask again.
    pub(super) fn is_scarce(&self, rule: &str, upstream: &str, now: Instant) -> bool {
        let few = |left: Left| left.remaining.saturating_mul(FEW) < left.limit && now < left.said + left.window / 4;
        self.0.get(&(rule.to_owned(), upstream.to_owned())).is_some_and(few)
    }
}

/// A number that may be followed by its window in seconds, as in Docker Hub's `ratelimit-remaining: 76;w=21600`.
fn number(headers: &HeaderMap, name: &str) -> Option<(i64, Option<Duration>)> {
    let mut parts = headers.get(name)?.to_str().ok()?.split(';').map(str::trim);
    let number = parts.next()?.parse().ok()?;
    let window = parts.find_map(|part| part.strip_prefix("w=")?.parse().ok());
    Some((number, window.map(Duration::from_secs)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(limit: &str, remaining: &str) -> HeaderMap {
        let header = |name: &'static str, value: &str| (name.parse().unwrap(), value.parse().unwrap());
        HeaderMap::from_iter([header(LIMIT, limit), header(REMAINING, remaining)])
    }

    #[test]
    fn few_are_left_for_a_part_of_the_window() {
        let (scarcity, start) = (Scarcity::new(), Instant::now());
        assert_eq!(
            scarcity.heard("hub", "https://hub.io", &headers("100;w=21600", "25;w=21600"), start),
            (Some(100), Some(25))
        );
        assert!(!scarcity.is_scarce("hub", "https://hub.io", start), "a quarter");
        scarcity.heard("hub", "https://hub.io", &headers("100;w=21600", "24;w=21600"), start);
        assert!(
            scarcity.is_scarce("hub", "https://hub.io", start) && !scarcity.is_scarce("hub", "https://other.io", start)
        );
        assert!(scarcity.is_scarce("hub", "https://hub.io", start + Duration::from_secs(5399)));
        assert!(
            !scarcity.is_scarce("hub", "https://hub.io", start + Duration::from_secs(5400)),
            "it may be asked again"
        );
        scarcity.heard("hub", "https://hub.io", &headers("100", "1"), start);
        assert!(!scarcity.is_scarce("hub", "https://hub.io", start + UNSAID / 4));
    }

    #[test]
    fn limits_are_read_with_or_without_their_window() {
        let scarcity = Scarcity::new();
        let heard =
            |limit, remaining| scarcity.heard("hub", "https://hub.io", &headers(limit, remaining), Instant::now());
        assert_eq!(heard("5", "x;w=1"), (Some(5), None));
        assert_eq!(heard("5 ; w=60", "-3"), (Some(5), Some(-3)));
        assert_eq!(scarcity.heard("hub", "https://hub.io", &HeaderMap::new(), Instant::now()), (None, None));
        assert!(
            scarcity.is_scarce("hub", "https://hub.io", Instant::now()),
            "an answer that says nothing changes nothing"
        );
        heard(&i64::MAX.to_string(), &i64::MAX.to_string());
    }
}
