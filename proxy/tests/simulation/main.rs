//! A thousand nodes and more on virtual time. The product's decisions on sources (`peers::{ring, members, swarm,
//! health}`, `fill::{RangePlan, Pace, ConnectionScaler}`) drive a network whose links are shared max-min fair.
//!
//! No test depends on a real clock: the same shape always takes the same virtual time. The processor, the disk and
//! packets are not simulated; `make bench` measures these.

mod links;
mod moving;
mod network;
mod sources;

use dray::config::Zones;

use crate::network::{CARD, Network};

/// What is simulated.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) nodes: usize,
    pub(crate) slow: Slow,
    pub(crate) zones: Between,
    /// Capacity of the upstream, in bytes a second.
    pub(crate) upstream: f64,
    /// `(n, seconds)`: one node in `n` is killed at that time, and the first owner.
    pub(crate) killed: Option<(usize, f64)>,
}

/// The nodes whose card is ten times slower.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Slow {
    None,
    /// One in this many nodes, without the owners.
    OneIn(usize),
    /// All owners.
    Owners,
}

/// Zones of equally many nodes, and the line from each to each other, in bytes a second.
#[derive(Clone, Copy)]
pub(crate) struct Between {
    pub(crate) count: usize,
    pub(crate) policy: Zones,
    pub(crate) between: f64,
}

const ONE_ZONE: Between = Between { count: 1, policy: Zones::Prefer, between: CARD };

/// The figures when all healthy nodes have the image.
pub(crate) struct Outcome {
    /// When each healthy node had the image, sorted. The unit is the time that the image takes through a card, or from
    /// the upstream if that is slower.
    pub(crate) finished: Vec<f64>,
    /// Sent by the upstream, sent by the busiest node, and sent across zones, in images.
    pub(crate) upstream: f64,
    pub(crate) busiest: f64,
    pub(crate) crossed: f64,
}

impl Outcome {
    fn median(&self) -> f64 {
        self.finished[self.finished.len() / 2]
    }

    /// When 99 of 100 nodes have it.
    fn percentile_99(&self) -> f64 {
        self.finished[self.finished.len() * 99 / 100]
    }

    fn last(&self) -> f64 {
        *self.finished.last().expect("a node")
    }
}

#[allow(clippy::print_stdout, reason = "the figures are what it is for")]
fn simulate(shape: Shape) -> Outcome {
    let outcome = Network::new(shape).run();
    println!(
        "{} nodes, upstream {:.1} x card, slow {:?}, {} zones ({:?}), killed {:?}: \
         median {:.2} x, 99 of 100 {:.2} x, last {:.2} x, upstream {:.3} x, busiest {:.2} x, crossed {:.3} x",
        shape.nodes,
        shape.upstream / CARD,
        shape.slow,
        shape.zones.count,
        shape.zones.policy,
        shape.killed,
        outcome.median(),
        outcome.percentile_99(),
        outcome.last(),
        outcome.upstream,
        outcome.busiest,
        outcome.crossed
    );
    outcome
}

/// A thousand healthy nodes in one zone, or as many as `DRAY_SIMULATED` sets.
fn all_healthy() -> Shape {
    let nodes = std::env::var("DRAY_SIMULATED").map_or(1000, |text| text.parse().expect("a number of nodes"));
    Shape { nodes, slow: Slow::None, zones: ONE_ZONE, upstream: CARD, killed: None }
}

#[test]
fn image_reaches_a_thousand_nodes_at_card_speed() {
    let outcome = simulate(all_healthy());
    assert!(outcome.median() <= 1.7, "half of them are done at {:.2} x size / card", outcome.median());
    assert!(outcome.last() <= 2.2, "the last is done at {:.2} x size / card", outcome.last());
    assert!(outcome.upstream <= 1.01 && outcome.busiest <= 2.5);
}

#[test]
fn slow_nodes_do_not_slow_the_others() {
    let outcome = simulate(Shape { slow: Slow::OneIn(20), ..all_healthy() });
    assert!(outcome.last() <= 3.0, "the last healthy one is done at {:.2} x size / card", outcome.last());
    assert!(outcome.upstream <= 1.01);
}

/// All five owners are slow, five times what one slow node does to a cluster. Without deputies an image takes ten times
/// as long.
#[test]
fn slow_owners_do_not_slow_the_others_as_much() {
    let shape = all_healthy();
    let outcome = simulate(Shape { nodes: shape.nodes / 5, slow: Slow::Owners, ..shape });
    assert!(outcome.median() <= 4.0, "half of the healthy ones are done at {:.2} x size / card", outcome.median());
    assert!(outcome.upstream <= 1.01);
}

/// What an owner sends to its followers must not fill its card.
#[test]
fn slow_upstream_is_used_to_the_full() {
    let shape = all_healthy();
    for nodes in [8, shape.nodes / 5] {
        let outcome = simulate(Shape { nodes, upstream: CARD / 2.0, ..shape });
        assert!(outcome.last() <= 1.3, "the last is done at {:.2} x size / upstream", outcome.last());
        assert!(outcome.upstream <= 1.01 && outcome.busiest <= 2.0);
    }
}

/// Each zone has its own owner, and only that downloads from the other zone.
#[test]
fn image_enters_each_zone_once() {
    let shape = all_healthy();
    let zones = Between { count: 2, policy: Zones::Prefer, between: CARD };
    let outcome = simulate(Shape { nodes: shape.nodes / 2, zones, ..shape });
    assert!(outcome.crossed <= 1.05, "{:.3} images crossed", outcome.crossed);
    assert!(outcome.upstream <= 1.01);
    assert!(outcome.last() <= 3.0, "the last is done at {:.2} x size / card", outcome.last());
}

#[test]
fn isolated_zones_send_each_other_nothing() {
    let shape = all_healthy();
    let zones = Between { count: 2, policy: Zones::Isolate, between: CARD };
    let outcome = simulate(Shape { nodes: shape.nodes / 5, zones, ..shape });
    assert!(outcome.crossed == 0.0, "{:.3} images crossed", outcome.crossed);
    assert!((1.99..=2.02).contains(&outcome.upstream), "one fetches for each: {:.3}", outcome.upstream);
}

/// One node in fifty is killed, and the owner of the largest layer: its successor continues with what other nodes have.
#[test]
fn dead_nodes_delay_the_others_little() {
    let outcome = simulate(Shape { killed: Some((50, 1.0)), ..all_healthy() });
    assert!(outcome.last() <= 3.0, "the last living one is done at {:.2} x size / card", outcome.last());
    assert!(outcome.upstream <= 1.05, "{:.3} images from the upstream", outcome.upstream);
}
