//! `[tracing]`: traces of requests, and the collector that they are exported to.

use serde::Deserialize;
use serde::de::{Deserializer, Error};
use url::Url;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// An OpenTelemetry collector. None: trace contexts are only propagated.
    #[serde(deserialize_with = "collector")]
    pub otlp: Option<Url>,
    /// The share of requests without a trace for which dray starts one: from 0 to 1.
    #[serde(deserialize_with = "share")]
    pub sample: f64,
}

impl Default for Tracing {
    fn default() -> Self {
        Self { otlp: None, sample: 1.0 }
    }
}

impl Tracing {
    /// A key that has no effect without a collector.
    pub(super) fn is_useless(&self) -> Option<&'static str> {
        (self.otlp.is_none() && *self != Self::default()).then_some("tracing.sample")
    }
}

fn collector<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if cfg!(not(feature = "otlp")) {
        return Err(D::Error::custom("this dray was built without the feature otlp: it exports no traces"));
    }
    let url = Url::parse(&text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    if url.as_ref().is_some_and(|url| url.port() == Some(4317)) {
        return Err(D::Error::custom(
            "otlp: port 4317 is OTLP over gRPC, which dray does not support: use the HTTP port, 4318 by default",
        ));
    }
    let plain = url.filter(|url| url.query().is_none() && url.fragment().is_none() && url.username().is_empty());
    let how = "is not a valid URL: expected http://HOST:4318 of an OpenTelemetry collector (OTLP over HTTP)";
    plain.map(Some).ok_or_else(|| D::Error::custom(format!("otlp = \"{text}\" {how}")))
}

fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let share = f64::deserialize(deserializer)?;
    if (0.0..=1.0).contains(&share) {
        return Ok(share);
    }
    Err(D::Error::custom(format!("sample = {share}: write a share of all requests, from 0.0 to 1.0")))
}
