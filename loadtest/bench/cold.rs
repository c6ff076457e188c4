//! First pulls: through dray, direct, and through other caches.

use std::time::Instant;

use dray_tests::registry::Registry;

use super::rig::{GIB, ROUNDS, Rig, Server, clean, curl, curls, gigabytes, median, row};

/// From upstreams that limit the rate of each connection.
pub(crate) async fn limited(rig: &Rig) {
    for (server, name, bar) in [(Server::Gigabit, "125 MB/s", "<= 1.03 x"), (Server::Limited, "40 MB/s", "<= 0.333 x")]
    {
        let (mut ratios, mut delays, mut directs, mut pulls) = (vec![], vec![], vec![], vec![]);
        for _ in 0..ROUNDS {
            let direct = curl(&rig.url(server));
            let dray = rig.dray(server);
            let pull = curl(&dray.url(&rig.path()));
            ratios.push(pull.seconds / direct.seconds);
            delays.push((pull.first_byte - direct.first_byte) * 1e3);
            directs.push(direct.seconds);
            pulls.push(pull.seconds);
            clean(dray);
        }
        row(
            &format!("1 GiB cold, upstream at {name} a connection"),
            &format!("{:.2} s", median(&pulls)),
            &format!("{:.3} x direct ({:.2} s)", median(&ratios), median(&directs)),
            bar,
        );
        row("its first byte", &format!("{:+.1} ms", median(&delays)), "after the upstream's", "<= 5 ms");
    }
}

/// From an upstream as fast as this machine.
pub(crate) async fn unlimited(rig: &Rig) {
    let (mut pulls, mut registries, mut caches, mut ratios) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let dray = rig.dray(Server::Fast);
        let pull = curl(&dray.url(&rig.path())).seconds;
        clean(dray);
        let remote = rig.nginx.url(Server::Fast as usize);
        let registry = Registry::with(&format!("proxy: {{remoteurl: \"{remote}\"}}\n")).await;
        let through = curl(&format!("{}{}", registry.url(), rig.path())).seconds;
        drop(registry);
        let _ = std::fs::remove_dir_all(rig.dir.path().join("proxy_cache"));
        let cache = curl(&rig.url(Server::Cache)).seconds;
        pulls.push(pull);
        registries.push(through);
        caches.push(cache);
        ratios.push(through / pull);
    }
    row(
        "1 GiB cold, upstream unlimited",
        &format!("{:.2} GB/s", gigabytes(median(&pulls))),
        &format!(
            "{:.2} x docker-registry ({:.2} GB/s); nginx proxy_cache {:.2} GB/s",
            median(&ratios),
            gigabytes(median(&registries)),
            gigabytes(median(&caches))
        ),
        ">= 0.6 GB/s, 2 x",
    );
}

/// Twenty clients at once on a cold blob, from an upstream that is slower than this machine.
pub(crate) async fn crowd(rig: &Rig) {
    let (mut ratios, mut shares) = (vec![], vec![]);
    for _ in 0..3 {
        let alone = rig.dray(Server::Single);
        let one = curl(&alone.url(&rig.path()));
        clean(alone);
        let dray = rig.dray(Server::Single);
        let started = Instant::now();
        curls(&dray.url(&rig.path()), 20);
        ratios.push(started.elapsed().as_secs_f64() / one.seconds);
        #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
        let share = dray.metric("dray_upstream_bytes_total{rule=\"docker.io\"}").await as f64 / GIB as f64;
        shares.push(share);
        clean(dray);
    }
    row(
        "20 clients, one cold GiB, upstream at 125 MB/s in all",
        &format!("{:.2} x one client's time", median(&ratios)),
        "",
        "<= 1.15 x",
    );
    row("its upstream bytes", &format!("{:.3} x the blob", median(&shares)), "", "<= 1.01 x");
}
