//! The comparison benchmark: dray beside direct pulls, nginx and docker-registry, in one run on one machine.
//!
//! Every figure is a ratio to a measurement of the same run: the median of several alternating rounds. Run it with
//! `make bench`; RESULTS.md holds its latest output.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints, and stops at the first surprise")]

mod attack;
mod cluster;
mod cold;
mod disk;
mod limits;
mod load;
mod mirror;
mod model;
mod node;
mod outage;
mod private;
mod reload;
mod rig;
mod seen;
mod small;
mod warm;

use rig::Rig;

#[tokio::main]
async fn main() {
    // Names of parts on the command line. None: all parts.
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let runs = |part: &str| wanted.is_empty() || wanted.iter().any(|name| name == part);
    println!("| what | measured | compared with | bar |\n|---|---|---|---|");
    for part in cluster::PARTS.into_iter().filter(|part| runs(part)) {
        cluster::part(part);
    }
    if runs("limits") {
        limits::upstream().await;
    }
    if runs("mirror") {
        mirror::dead().await;
    }
    if runs("model") {
        model::shared().await;
    }
    if runs("model-killed") {
        model::resumed().await;
    }
    if runs("attack") {
        attack::all().await;
    }
    if runs("outage") {
        outage::dead().await;
    }
    if runs("private") {
        private::hits().await;
    }
    if runs("reload") {
        reload::under_load().await;
    }
    if runs("seen") {
        seen::by_log_and_metrics().await;
        seen::by_people().await;
    }
    let needs_no_rig = |name: &String| {
        matches!(
            name.as_str(),
            "attack" | "limits" | "mirror" | "model" | "model-killed" | "outage" | "private" | "reload" | "seen"
        ) || cluster::PARTS.contains(&name.as_str())
    };
    if !wanted.is_empty() && wanted.iter().all(needs_no_rig) {
        return;
    }
    let rig = Rig::new().await;
    if runs("cold") {
        cold::limited(&rig).await;
        cold::unlimited(&rig).await;
    }
    if runs("crowd") {
        cold::crowd(&rig).await;
    }
    if runs("warm") {
        warm::plain(&rig).await;
        warm::tls(&rig).await;
    }
    if runs("small") {
        small::rates(&rig).await;
    }
    if runs("memory") {
        load::memory(&rig).await;
    }
    if runs("start") {
        disk::start(&rig).await;
    }
    if runs("disk") {
        disk::churn(&rig).await;
    }
    if runs("node") {
        node::pull(&rig).await;
    }
}
