//! `dray explain IMAGE`: how a name is routed, and what would happen now.

use clap::Args;
use dray::pull::Explanation;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::operator::Process;
use super::table::{Paint, seconds};
use super::{Failure, block_on, say};

/// Tell how a running dray routes an image: rule, upstreams, credentials, owner, what is kept, what would happen now
#[derive(Args)]
pub(crate) struct Explain {
    /// Such as alpine, ghcr.io/team/app:1 or reg.corp:5000/app@sha256:...
    image: String,
    #[command(flatten)]
    process: Process,
    /// Print the JSON of /api/v1/explain instead
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let image = utf8_percent_encode(&self.image, NON_ALPHANUMERIC);
        let path = format!("/api/v1/explain?image={image}");
        let (json, explained) = block_on(self.process.ask::<Explanation>(&path))??;
        say(if self.json { json } else { text(&explained, Paint::of_stdout()) }.as_str());
        Ok(())
    }
}

fn text(explained: &Explanation, paint: Paint) -> String {
    let separator = if explained.reference.contains(':') { '@' } else { ':' };
    let name = format!("{}/{}{separator}{}", explained.registry, explained.repository, explained.reference);
    let mut lines = vec![paint.bold(&name)];
    let mut line = |what: &str, value: &str| lines.push(format!("  {what:<12} {value}"));
    let rule = if explained.rule == "*" { "* (none of the file, or its last)" } else { &explained.rule };
    line("rule", rule);
    line("access", &explained.access);
    line("credentials", &explained.credentials);
    for (nth, upstream) in explained.upstreams.iter().enumerate() {
        let state = upstream.state.as_deref().map_or("not asked lately", |state| state);
        let text = format!("{}/{} ({}, {state})", upstream.url, upstream.repository, upstream.trust);
        line(if nth == 0 { "upstreams" } else { "" }, &text);
    }
    match &explained.owner {
        Some(owner) if owner.is_this_node => line("owner", "this node"),
        Some(owner) => line("owner", &format!("{} in zone {}", owner.address, owner.zone)),
        None => line("owner", "none: this node fetches it itself"),
    }
    if let Some(tag) = &explained.tag {
        let believed =
            tag.believed_seconds.map_or("for ever".to_owned(), |believed| format!("for {}", seconds(believed)));
        line("tag", &format!("{}, asked {} ago, believed {believed}", tag.digest, seconds(tag.age_seconds)));
    }
    line("kept", explained.kept.as_deref().unwrap_or("no"));
    line("now", &explained.now);
    lines.join("\n")
}
