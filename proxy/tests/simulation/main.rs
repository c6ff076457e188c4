//! A thousand nodes and more on virtual time: the code that decides who asks whom for which bytes
//! (`peers::{ring, members, swarm, health}`, `fill::{RangePlan, Pace, ConnectionScaler}`) drives a network whose links are shared
//! max-min fair.
//!
//! Nothing here measures a real clock: the same shape always takes the same virtual time. Not
//! simulated: the processor, the disk, and packets; what is slow there is measured by `make bench`.

mod asking;
mod links;
mod moving;
mod network;

use dray::config::Zones;

use crate::network::{CARD, Network};

/// What is simulated.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) nodes: usize,
    pub(crate) slow: Slow,
    pub(crate) zones: Between,
    /// What the upstream sends to all together, in bytes a second.
    pub(crate) upstream: f64,
    /// One in so many is killed after so many seconds, and so is an owner.
    pub(crate) killed: Option<(usize, f64)>,
}

/// Whose card is ten times slower.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Slow {
    Nobody,
    /// One in so many of those who own nothing.
    OneIn(usize),
    /// All who own something.
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

/// When all who are well have it.
pub(crate) struct Outcome {
    /// When each node had all, in the time that its image takes through its own card, or from the upstream where that is
    /// slower; without the slow and the dead.
    pub(crate) finished: Vec<f64>,
    /// What left the origin and the busiest node, and what passed from zone to zone, in images.
    pub(crate) upstream: f64,
    pub(crate) busiest: f64,
    pub(crate) crossed: f64,
}

impl Outcome {
    fn median(&self) -> f64 {
        self.finished[self.finished.len() / 2]
    }

    /// When 99 of 100 have it.
    fn most(&self) -> f64 {
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
        "{} nodes, upstream {:.1} x card, slow {:?}, {} zones ({:?}), killed {:?}: median {:.2} x, 99 of 100 {:.2} x, last {:.2} x, origin {:.3} x, busiest {:.2} x, \
         crossed {:.3} x",
        shape.nodes,
        shape.upstream / CARD,
        shape.slow,
        shape.zones.count,
        shape.zones.policy,
        shape.killed,
        outcome.median(),
        outcome.most(),
        outcome.last(),
        outcome.upstream,
        outcome.busiest,
        outcome.crossed
    );
    outcome
}

/// A thousand nodes, or as many as `DRAY_SIMULATED` says, of which all are well and equally near.
fn all_well() -> Shape {
    let nodes = std::env::var("DRAY_SIMULATED").map_or(1000, |text| text.parse().expect("a number of nodes"));
    Shape { nodes, slow: Slow::Nobody, zones: ONE_ZONE, upstream: CARD, killed: None }
}

#[test]
fn an_image_reaches_a_thousand_nodes_at_nearly_the_speed_of_their_cards() {
    let outcome = simulate(all_well());
    assert!(outcome.median() <= 1.7, "half of them are done at {:.2} x size / card", outcome.median());
    assert!(outcome.last() <= 2.2, "the last is done at {:.2} x size / card", outcome.last());
    assert!(outcome.upstream <= 1.01 && outcome.busiest <= 2.5);
}

#[test]
fn slow_nodes_do_not_slow_the_others() {
    let outcome = simulate(Shape { slow: Slow::OneIn(20), ..all_well() });
    assert!(outcome.last() <= 3.0, "the last healthy one is done at {:.2} x size / card", outcome.last());
    assert!(outcome.upstream <= 1.01);
}

/// All five at once, which is five times what one slow node does to a cluster. Without deputies it takes ten
/// times as long as their cards would need.
#[test]
fn slow_owners_do_not_slow_the_others_as_much() {
    let shape = all_well();
    let outcome = simulate(Shape { nodes: shape.nodes / 5, slow: Slow::Owners, ..shape });
    assert!(outcome.median() <= 4.0, "half of the healthy ones are done at {:.2} x size / card", outcome.median());
    assert!(outcome.upstream <= 1.01);
}

/// What an owner sends to all who wait for it must not fill its card.
#[test]
fn slow_upstream_is_used_to_the_full() {
    let shape = all_well();
    for nodes in [8, shape.nodes / 5] {
        let outcome = simulate(Shape { nodes, upstream: CARD / 2.0, ..shape });
        assert!(outcome.last() <= 1.3, "the last is done at {:.2} x size / upstream", outcome.last());
        assert!(outcome.upstream <= 1.01 && outcome.busiest <= 2.0);
    }
}

/// Each zone has an owner of its own, and only that one fetches from the other.
#[test]
fn an_image_enters_each_zone_once() {
    let shape = all_well();
    let zones = Between { count: 2, policy: Zones::Prefer, between: CARD };
    let outcome = simulate(Shape { nodes: shape.nodes / 2, zones, ..shape });
    assert!(outcome.crossed <= 1.05, "{:.3} images crossed", outcome.crossed);
    assert!(outcome.upstream <= 1.01);
    assert!(outcome.last() <= 3.0, "the last is done at {:.2} x size / card", outcome.last());
}

#[test]
fn isolated_zones_send_each_other_nothing() {
    let shape = all_well();
    let zones = Between { count: 2, policy: Zones::Isolate, between: CARD };
    let outcome = simulate(Shape { nodes: shape.nodes / 5, zones, ..shape });
    assert!(outcome.crossed == 0.0, "{:.3} images crossed", outcome.crossed);
    assert!((1.99..=2.02).contains(&outcome.upstream), "one fetches for each: {:.3}", outcome.upstream);
}

/// One in fifty, and the owner of the largest layer among them: its successor goes on with what others have.
#[test]
fn the_dead_delay_the_others_little() {
    let outcome = simulate(Shape { killed: Some((50, 1.0)), ..all_well() });
    assert!(outcome.last() <= 3.0, "the last living one is done at {:.2} x size / card", outcome.last());
    assert!(outcome.upstream <= 1.05, "{:.3} images from the origin", outcome.upstream);
}
