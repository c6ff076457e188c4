//! `dray explain IMAGE`: how dray routes an image, and what it would do with a request now.

use clap::Args;
use dray::pull::Explanation;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::operator::AdminApi;
use super::table::{Paint, seconds};
use super::{Failure, block_on, print};

/// Show how a running dray routes an image: rule, upstreams, credentials, owner, what is cached, what a request would
/// do
#[derive(Args)]
pub(crate) struct Explain {
    /// The image, such as alpine, ghcr.io/team/app:1 or reg.corp:5000/app@sha256:...
    image: String,
    #[command(flatten)]
    admin: AdminApi,
    /// Print the JSON of /api/v1/explain
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let image = utf8_percent_encode(&self.image, NON_ALPHANUMERIC);
        let path = format!("/api/v1/explain?image={image}");
        let (json, explained) = block_on(self.admin.get::<Explanation>(&path))??;
        print(if self.json { json } else { text(&explained, Paint::of_stdout()) }.as_str());
        Ok(())
    }
}

fn text(explained: &Explanation, paint: Paint) -> String {
    let separator = if explained.reference.contains(':') { '@' } else { ':' };
    let name = format!("{}/{}{separator}{}", explained.registry, explained.repository, explained.reference);
    let mut lines = vec![paint.bold(&name)];
    let mut line = |what: &str, value: &str| lines.push(format!("  {what:<14} {value}"));
    let rule = if explained.rule == "*" { "* (no other rule matches)" } else { &explained.rule };
    line("rule", rule);
    line("authorization", &explained.authorization);
    line("credentials", &explained.credentials);
    for (nth, upstream) in explained.upstreams.iter().enumerate() {
        let state = upstream.state.as_deref().map_or("unknown", |state| state);
        let text = format!("{}/{} ({}, {state})", upstream.url, upstream.repository, upstream.trust);
        line(if nth == 0 { "upstreams" } else { "" }, &text);
    }
    match &explained.owner {
        Some(owner) if owner.is_this_node => line("owner", "this node"),
        Some(owner) => line("owner", &format!("{} in zone {}", owner.address, owner.zone)),
        None => line("owner", "none: this node downloads it from upstream"),
    }
    if let Some(tag) = &explained.tag {
        let ttl = match tag.ttl_seconds {
            None => "no TTL".to_owned(),
            Some(ttl) if ttl <= tag.age_seconds => format!("TTL {} (stale)", seconds(ttl)),
            Some(ttl) => format!("TTL {}", seconds(ttl)),
        };
        line("tag", &format!("{}, revalidated {} ago, {ttl}", tag.digest, seconds(tag.age_seconds)));
    }
    line("cached", explained.cached.as_deref().unwrap_or("no"));
    line("now", &explained.now);
    lines.join("\n")
}
