//! `dray status`: the status page as text.

use clap::Args;
use dray::status::{ClusterStatus, Status};
use dray::upstream::UpstreamView;

use super::cluster::cluster_text;
use super::operator::AdminApi;
use super::table::{Paint, Table, bytes, seconds};
use super::{Failure, block_on, print};
use dray::times::RETRY_INTERVAL;

/// Show the state of a running dray: requests by source, downloads, upstreams, peers, disk
#[derive(Args)]
pub(crate) struct StatusCommand {
    #[command(flatten)]
    admin: AdminApi,
    /// Print the JSON of /api/v1/status
    #[arg(long)]
    json: bool,
    /// Show all nodes of the cluster at a glance; peers need peers.key_file or peers.mtls
    #[arg(long)]
    cluster: bool,
    /// Repeat every two seconds until interrupted
    #[arg(long)]
    watch: bool,
}

/// Rows per table. More rows scroll the first tables off a terminal; with fewer rows, `--watch` hides more entries.
const MAX_ROWS: usize = 15;

impl StatusCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        block_on(async {
            loop {
                let (json, shown) = self.fetch(Paint::of_stdout()).await?;
                match (self.json, self.watch) {
                    (true, _) => print(&json),
                    (false, false) => print(&shown),
                    // Clears the screen first.
                    (false, true) => print(&format!("\x1b[2J\x1b[H{shown}")),
                }
                if !self.watch {
                    return Ok(());
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        })?
    }
}

impl StatusCommand {
    /// The JSON, and the same as text.
    async fn fetch(&self, paint: Paint) -> Result<(String, String), Failure> {
        if self.cluster {
            let (json, cluster) = self.admin.get::<ClusterStatus>("/api/v1/cluster").await?;
            return Ok((json, cluster_text(&cluster, paint)));
        }
        let (json, status) = self.admin.get::<Status>("/api/v1/status").await?;
        Ok((json, text(&status, paint)))
    }
}

fn text(status: &Status, paint: Paint) -> String {
    let traffic = status.traffic;
    let mut text = format!(
        "{} {}, configuration {}, up {}, clients at {}{}\n",
        paint.bold("dray"),
        status.version,
        status.config_hash,
        seconds(status.uptime_seconds),
        status.registry_listen,
        status.peers_listen.map(|at| format!(", peers at {at}")).unwrap_or_default(),
    );
    text += &format!(
        "sent {} to clients; received {} from upstreams and {} from peers; disk {} of {}, and {} for small objects\n",
        paint.good(&bytes(traffic.sent_bytes)),
        bytes(traffic.upstream_bytes),
        bytes(traffic.peer_bytes),
        bytes(status.cache.blobs_bytes),
        bytes(status.cache.blobs_limit_bytes),
        bytes(status.cache.small_bytes),
    );
    let tables =
        [sources(status), fills(status), upstreams(status, paint), peers(status, paint), recent(status, paint)];
    for table in tables {
        if !table.is_empty() {
            text += &format!("\n{}\n", table.lines(paint));
        }
    }
    if status.upstreams.len() > MAX_ROWS {
        text += &format!("  and {} more upstreams\n", status.upstreams.len() - MAX_ROWS);
    }
    if status.peers.len() > MAX_ROWS {
        text += &format!("  and {} more peers\n", status.peers.len() - MAX_ROWS);
    }
    text.trim_end().to_owned()
}

/// Requests and bytes by source.
fn sources(status: &Status) -> Table {
    let mut sources = Table::new(&["served from", ">requests", ">bytes"]);
    for (source, traffic) in &status.sources {
        sources.row(&[source, &traffic.requests.to_string(), &bytes(traffic.bytes)]);
    }
    sources
}

/// Downloads in progress.
fn fills(status: &Status) -> Table {
    let mut fills = Table::new(&["downloading", "blob", ">bytes", ">of", ">done", "role"]);
    for fill in status.downloads.iter().take(MAX_ROWS) {
        let done = fill.total_bytes.map(|total| format!("{} %", 100 * fill.written_bytes / total.max(1)));
        let total = fill.total_bytes.map(bytes);
        let role = match fill.role.as_str() {
            "global" => "owner",
            "zone" => "zone owner",
            _ => "follower",
        };
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

/// The upstreams; unhealthy ones come first.
fn upstreams(status: &Status, paint: Paint) -> Table {
    let mut upstreams = Table::new(&["upstream", "rule", "state", ">remaining", ">tokens"]);
    let mut by_state: Vec<_> = status.upstreams.iter().collect();
    by_state.sort_by_key(|upstream| upstream.state == "healthy");
    for upstream in by_state.into_iter().take(MAX_ROWS) {
        let state = format!("{}{}", upstream.state, detail(upstream));
        let state = if upstream.state == "healthy" { paint.good(&state) } else { paint.bad(&state) };
        let left = upstream.rate_limit_remaining.map(|left| left.to_string());
        let tokens = upstream.tokens.to_string();
        upstreams.row(&[&upstream.upstream, &upstream.rule, &state, left.as_deref().unwrap_or("-"), &tokens]);
    }
    upstreams
}

/// What an operator asks next: since when, why, and when dray tries again.
fn detail(upstream: &UpstreamView) -> String {
    let since = upstream.since_seconds.map(|since| format!(" for {}", seconds(since)));
    let limit = upstream.rate_limited_seconds.map(|left| format!(" for another {}", seconds(left)));
    let error = upstream.last_error.as_ref().filter(|_| matches!(&*upstream.state, "down" | "blocked"));
    let error = error.map(|error| format!(": {error}"));
    let probe = upstream.next_probe_seconds.map(|next| format!("; next probe in {next:.0} s"));
    [since, limit, error, probe].into_iter().flatten().collect()
}

/// The peers; unhealthy ones come first.
fn peers(status: &Status, paint: Paint) -> Table {
    let mut peers = Table::new(&["peer", "zone", "health", ">first byte", ">share"]);
    let mut by_health: Vec<_> = status.peers.iter().collect();
    by_health.sort_by_key(|peer| peer.state == "healthy");
    for peer in by_health.iter().take(MAX_ROWS) {
        let health = if peer.state == "healthy" { paint.good(&peer.state) } else { paint.bad(&peer.state) };
        let first_byte = peer.first_byte_ms.map(|ms| format!("{ms:.1} ms"));
        let name = if peer.is_this_node { format!("{} (this one)", peer.address) } else { peer.address.to_string() };
        let share = format!("{:.1} %", 100.0 * peer.share);
        peers.row(&[&name, &peer.zone, &health, first_byte.as_deref().unwrap_or("-"), &share]);
    }
    peers
}

/// The most recent responses.
fn recent(status: &Status, paint: Paint) -> Table {
    let mut recent = Table::new(&["recent requests", "of", ">status", "from", ">bytes", ">first byte", ">took"]);
    for response in status.recent_requests.iter().take(MAX_ROWS) {
        let code = response.status.to_string();
        let code = if response.status < 400 { code } else { paint.bad(&code) };
        let first_byte = response.first_byte_ms.map(|ms| format!("{ms:.1} ms"));
        recent.row(&[
            &format!("{} {}", response.route, short(&response.reference)),
            &response.image,
            &code,
            if response.source == "none" { "-" } else { &response.source },
            &bytes(response.bytes),
            first_byte.as_deref().unwrap_or("-"),
            &format!("{:.1} ms", response.total_ms),
        ]);
    }
    recent
}

/// A digest with the first 12 hexadecimal digits.
fn short(reference: &str) -> String {
    match reference.split_once(':') {
        Some((algorithm, hex)) if hex.len() > 12 => format!("{algorithm}:{}", &hex[..12]),
        _ => reference.to_owned(),
    }
}
