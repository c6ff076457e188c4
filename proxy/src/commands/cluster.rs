//! `dray status --cluster`: all nodes as text.

use dray::status::{ClusterStatus, NodeSummary};

use super::table::{Paint, Table, bytes, seconds};

/// Errors per table. More rows scroll the first tables off a terminal.
const MAX_ROWS: usize = 15;

pub(super) fn cluster_text(cluster: &ClusterStatus, paint: Paint) -> String {
    let reached = cluster.nodes.iter().filter(|node| node.result.is_some()).count();
    let ratio = cluster.hit_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{:.1} %", ratio * 100.0));
    let mut text = format!(
        "{} of {} nodes; hit ratio {ratio}; sent {} to clients, {} of them without an upstream; received {} from upstreams \
         and {} from peers; {} downloads in progress\n",
        reached,
        cluster.nodes.len(),
        bytes(cluster.traffic.sent_bytes),
        paint.good(&bytes(cluster.saved_bytes)),
        bytes(cluster.traffic.upstream_bytes),
        bytes(cluster.traffic.peer_bytes),
        cluster.downloads,
    );
    for (what, values) in [("releases", &cluster.versions), ("configurations", &cluster.config_hashes)] {
        if values.len() > 1 {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            text += &format!("{}\n", paint.bad(&format!("{what} differ: {}", values.join(", "))));
        }
    }
    for table in [nodes(cluster, paint), troubles(cluster, paint)] {
        if !table.is_empty() {
            text += &format!("\n{}\n", table.lines(paint));
        }
    }
    text.trim_end().to_owned()
}

fn nodes(cluster: &ClusterStatus, paint: Paint) -> Table {
    let mut table = Table::new(&[
        "node",
        "release",
        "configuration",
        ">up",
        ">hit ratio",
        ">sent",
        ">from upstreams",
        ">from peers",
        ">disk",
    ]);
    for node in &cluster.nodes {
        let name = node.node.map_or_else(|| "this node".to_owned(), |address| address.to_string());
        match &node.result {
            Some(summary) => table.row(&[
                &name,
                &summary.version,
                &summary.config_hash,
                &seconds(summary.uptime_seconds),
                &hit_ratio(summary),
                &bytes(summary.traffic.sent_bytes),
                &bytes(summary.traffic.upstream_bytes),
                &bytes(summary.traffic.peer_bytes),
                &bytes(summary.blobs_bytes),
            ]),
            None => {
                let error = paint.bad(node.error.as_deref().unwrap_or("not reached"));
                table.row(&[&name, &error, "", "", "", "", "", "", ""]);
            }
        }
    }
    table
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
fn hit_ratio(summary: &NodeSummary) -> String {
    match summary.requests {
        0 => "-".to_owned(),
        requests => format!("{:.1} %", 100.0 * (1.0 - summary.upstream_requests as f64 / requests as f64)),
    }
}

/// Peers and upstreams that a node sees as unhealthy.
fn troubles(cluster: &ClusterStatus, paint: Paint) -> Table {
    let mut table = Table::new(&["node", "sees", "as", ">for", "because"]);
    let mut rows = Vec::new();
    for node in &cluster.nodes {
        let Some(summary) = &node.result else { continue };
        let name = node.node.map_or_else(|| "this node".to_owned(), |address| address.to_string());
        for peer in &summary.unhealthy_peers {
            rows.push([name.clone(), peer.address.to_string(), paint.bad(&peer.state), "-".into(), String::new()]);
        }
        for upstream in &summary.unhealthy_upstreams {
            let since = upstream.since_seconds.map_or_else(|| "-".to_owned(), seconds);
            let error = upstream.last_error.clone().unwrap_or_default();
            rows.push([name.clone(), upstream.upstream.clone(), paint.bad(&upstream.state), since, error]);
        }
    }
    for row in rows.iter().take(MAX_ROWS) {
        table.row(&row.each_ref().map(String::as_str));
    }
    table
}
