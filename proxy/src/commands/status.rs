//! `dray status`: what the status page shows, at a terminal.

use clap::Args;
use dray::status::Status;

use super::operator::Process;
use super::table::{Paint, Table, bytes, seconds};
use super::{Failure, block_on, say};
use dray::times::RETRY_INTERVAL;

/// Show what a running dray does: answers by source, fills, registries, peers, disk
#[derive(Args)]
pub(crate) struct StatusCommand {
    #[command(flatten)]
    process: Process,
    /// Print the JSON of /api/v1/status instead
    #[arg(long)]
    json: bool,
    /// Again every two seconds, until interrupted
    #[arg(long)]
    watch: bool,
}

/// More lines than anybody reads.
const MAX_LINES: usize = 15;

impl StatusCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        block_on(async {
            loop {
                let (json, status) = self.process.ask::<Status>("/api/v1/status").await?;
                match (self.json, self.watch) {
                    (true, _) => say(&json),
                    (false, false) => say(&text(&status, Paint::of_stdout())),
                    // From the top of an empty screen.
                    (false, true) => say(&format!("\x1b[2J\x1b[H{}", text(&status, Paint::of_stdout()))),
                }
                if !self.watch {
                    return Ok(());
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        })?
    }
}

fn text(status: &Status, paint: Paint) -> String {
    let traffic = status.traffic;
    let mut text = format!(
        "{} {}, up {}, clients at {}{}\n",
        paint.bold("dray"),
        status.version,
        seconds(status.uptime_seconds),
        status.registry,
        status.peers_listen.map(|at| format!(", peers at {at}")).unwrap_or_default(),
    );
    text += &format!(
        "sent {}, of which {} did not come from a registry; disk {} of {}, and {} for small objects\n",
        bytes(traffic.sent_bytes),
        paint.good(&bytes(traffic.saved_bytes)),
        bytes(status.cache.blobs_bytes),
        bytes(status.cache.blobs_limit),
        bytes(status.cache.small_bytes),
    );
    let tables =
        [sources(status), fills(status), upstreams(status, paint), peers(status, paint), recent(status, paint)];
    for table in tables {
        if !table.is_empty() {
            text += &format!("\n{}\n", table.lines(paint));
        }
    }
    if status.upstreams.len() > MAX_LINES {
        text += &format!("  and {} more registries\n", status.upstreams.len() - MAX_LINES);
    }
    if status.peers.len() > MAX_LINES {
        text += &format!("  and {} more peers\n", status.peers.len() - MAX_LINES);
    }
    text.trim_end().to_owned()
}

/// What clients were served from.
fn sources(status: &Status) -> Table {
    let mut sources = Table::new(&["answered from", ">requests", ">bytes"]);
    for (source, traffic) in &status.sources {
        let source = if source == "none" { "refused" } else { source };
        sources.row(&[source, &traffic.requests.to_string(), &bytes(traffic.bytes)]);
    }
    sources
}

/// Downloads in progress.
fn fills(status: &Status) -> Table {
    let mut fills = Table::new(&["being fetched", "blob", ">bytes", ">of", ">done", "as"]);
    for fill in status.fills.iter().take(MAX_LINES) {
        let done = fill.total_bytes.map(|total| format!("{} %", 100 * fill.written_bytes / total.max(1)));
        let total = fill.total_bytes.map(bytes);
        let role = if fill.role == "global" { "owner" } else { "follower" };
        fills.row(&[
            &fill.image,
            &short(&fill.digest),
            &bytes(fill.written_bytes),
            total.as_deref().unwrap_or("?"),
            done.as_deref().unwrap_or("?"),
            role,
        ]);
    }
    fills
}

/// The upstreams, those that are not healthy first.
fn upstreams(status: &Status, paint: Paint) -> Table {
    let mut upstreams = Table::new(&["registry", "rule", "state", ">pulls left", ">tokens"]);
    let mut by_state: Vec<_> = status.upstreams.iter().collect();
    by_state.sort_by_key(|upstream| upstream.state == "well");
    for upstream in by_state.into_iter().take(MAX_LINES) {
        let more = upstream.limited_seconds.map(|left| format!(", {} more", seconds(left))).unwrap_or_default();
        let state = format!("{}{more}", upstream.state);
        let state = if upstream.state == "well" { paint.good(&state) } else { paint.bad(&state) };
        let left = upstream.rate_limit_remaining.map(|left| left.to_string());
        let tokens = upstream.tokens.to_string();
        upstreams.row(&[&upstream.upstream, &upstream.rule, &state, left.as_deref().unwrap_or("-"), &tokens]);
    }
    upstreams
}

/// The peers, those that are not requested from first.
fn peers(status: &Status, paint: Paint) -> Table {
    let mut peers = Table::new(&["peer", "zone", "health", ">first byte", ">share"]);
    let mut by_health: Vec<_> = status.peers.iter().collect();
    by_health.sort_by_key(|peer| peer.is_well);
    for peer in by_health.iter().take(MAX_LINES) {
        let health = if peer.is_well { paint.good("well") } else { paint.bad("left alone") };
        let first_byte = peer.first_byte_ms.map(|ms| format!("{ms:.1} ms"));
        let name = if peer.is_this_node { format!("{} (this one)", peer.address) } else { peer.address.to_string() };
        let share = format!("{:.1} %", 100.0 * peer.share);
        peers.row(&[&name, &peer.zone, &health, first_byte.as_deref().unwrap_or("-"), &share]);
    }
    peers
}

/// The last responses.
fn recent(status: &Status, paint: Paint) -> Table {
    let mut recent = Table::new(&["last answers", "of", ">status", "from", ">bytes", ">first byte", ">took"]);
    for answered in status.recent.iter().take(MAX_LINES) {
        let code = answered.status.to_string();
        let code = if answered.status < 400 { code } else { paint.bad(&code) };
        let first_byte = answered.first_byte_ms.map(|ms| format!("{ms:.1} ms"));
        recent.row(&[
            &format!("{} {}", answered.route, short(&answered.reference)),
            &answered.image,
            &code,
            if answered.source == "none" { "-" } else { &answered.source },
            &bytes(answered.bytes),
            first_byte.as_deref().unwrap_or("-"),
            &format!("{:.1} ms", answered.total_ms),
        ]);
    }
    recent
}

/// Enough of a digest to tell it from others.
fn short(reference: &str) -> String {
    match reference.split_once(':') {
        Some((algorithm, hex)) if hex.len() > 12 => format!("{algorithm}:{}", &hex[..12]),
        _ => reference.to_owned(),
    }
}
