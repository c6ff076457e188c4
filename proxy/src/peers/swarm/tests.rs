use super::*;
use crate::peers::wire::Holder;

const MIB: u64 = 1024 * 1024;

fn peer(n: u16) -> SocketAddr {
    let [high, low] = n.to_be_bytes();
    SocketAddr::from(([10, 0, high, low], 5052))
}

fn mib(start: u64, end: u64) -> Span {
    Span { start: start * MIB, end: end * MIB }
}

fn at(millis: u64) -> Time {
    Duration::from_millis(millis)
}

/// Decides on a request, and records that the requester follows the decision.
fn decide(
    tracker: &mut Tracker,
    requester: Option<SocketAddr>,
    span: Span,
    best_source: BestSource,
    sending: u32,
    now: Time,
) -> PeerDecision {
    let decision = tracker.decide(requester, span, best_source, sending, now);
    tracker.record_in_flight(requester, span, now);
    decision
}

#[test]
fn loaded_node_redirects_to_a_peer_that_gets_the_range() {
    let mut tracker = Tracker::new(1);
    for n in 1..=3 {
        tracker.record(peer(n), &Spans::default(), 0, at(0));
    }
    assert_eq!(
        decide(&mut tracker, Some(peer(1)), mib(0, 16), BestSource::ThisNode, 1, at(0)),
        PeerDecision::Serve,
        "a low load"
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(2)), mib(0, 16), BestSource::ThisNode, 6, at(0)),
        PeerDecision::Redirect(peer(1))
    );
    tracker.record(peer(1), &Spans::default(), 6, at(0));
    assert_eq!(
        decide(&mut tracker, Some(peer(3)), mib(0, 16), BestSource::ThisNode, 6, at(0)),
        PeerDecision::Redirect(peer(2)),
        "which was redirected itself"
    );
    assert_eq!(
        decide(&mut tracker, None, mib(0, 16), BestSource::ThisNode, 0, at(0)),
        PeerDecision::Serve,
        "not more loaded than the others"
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(2)), mib(16, 32), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Serve,
        "no other peer has that"
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(1)), mib(0, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Serve,
        "all others wait for it"
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(3)), mib(0, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Redirect(peer(2)),
        "not to itself"
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(2)), mib(0, 16), BestSource::ThisNode, 9, at(20_000)),
        PeerDecision::Serve,
        "it never came"
    );
    assert!(tracker.holders(None).is_empty(), "no peer has reported any bytes");
}

#[test]
fn thousand_simultaneous_requesters_form_a_tree() {
    let mut tracker = Tracker::new(1000);
    // The hops of each range to each peer, and the bodies that each peer sends.
    let mut hops = std::collections::HashMap::new();
    let mut sent = std::collections::HashMap::<_, u32>::new();
    let mut sending = 0;
    for n in 0..1000 {
        for nth in 0..4 {
            let span = mib(nth * 16, (nth + 1) * 16);
            tracker.record(peer(n), &Spans::default(), 0, at(0));
            let from = match decide(&mut tracker, Some(peer(n)), span, BestSource::ThisNode, sending, at(0)) {
                PeerDecision::Redirect(from) => {
                    *sent.entry(from).or_default() += 1;
                    hops[&(from, nth)]
                }
                _ => {
                    sending += 1;
                    0
                }
            };
            hops.insert((peer(n), nth), from + 1);
        }
    }
    assert!(hops.values().all(|hops| *hops <= 30), "{:?}", hops.values().max());
    assert!(sending <= 16 && sent.values().all(|sent| *sent <= 8), "{sending}, {:?}", sent.values().max());
}

#[test]
fn peer_is_not_redirected_to_its_followers() {
    let mut tracker = Tracker::new(1);
    (1..=3).for_each(|n| tracker.record(peer(n), &Spans::default(), 0, at(0)));
    // The first peer is a deputy for the beginning only; the second peer gets the whole range from the first.
    assert_eq!(tracker.decide(Some(peer(1)), mib(0, 16), BestSource::ThisNode, 9, at(0)), PeerDecision::Serve);
    tracker.record_in_flight(Some(peer(1)), mib(0, 2), at(0));
    assert_eq!(
        decide(&mut tracker, Some(peer(2)), mib(0, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Redirect(peer(1))
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(1)), mib(2, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Serve,
        "the second waits for that as well"
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(3)), mib(2, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Redirect(peer(1))
    );
    assert_eq!(
        decide(&mut tracker, Some(peer(1)), mib(2, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Serve,
        "again"
    );
    tracker.record(peer(2), &mib(0, 16).into(), 0, at(0));
    assert_eq!(
        decide(&mut tracker, Some(peer(1)), mib(2, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Redirect(peer(2))
    );
}

#[test]
fn named_holders_are_bounded_and_least_loaded_first() {
    let mut tracker = Tracker::new(1);
    for n in 0..3000 {
        tracker.record(peer(n), &mib(0, 16).into(), 3000 - u32::from(n), at(n.into()));
    }
    assert_eq!(tracker.peers.len(), 512);
    let named: Vec<_> = tracker.holders(Some(peer(2999))).into_iter().map(|holder| holder.peer).collect();
    assert_eq!(named, (2991..2999).rev().map(peer).collect::<Vec<_>>());
}

#[test]
fn reported_spans_are_bounded() {
    let (mut tracker, mut view) = (Tracker::new(1), View::new(1));
    for nth in 0..10_000 {
        let have: Spans = Span { start: nth * 10, end: nth * 10 + 1 }.into();
        tracker.record(peer(1), &have, 0, at(0));
        view.learn(&Holder { peer: peer(1), load: 0, have });
    }
    assert!(tracker.peers[&peer(1)].have.iter().count() <= MAX_SPANS);
    assert!(view.peers[&peer(1)].have.iter().count() <= MAX_SPANS);
}

#[test]
fn bounds_grow_with_the_cluster() {
    let bounds =
        [1, 2_000, 5_000, 10_000, 1_000_000].map(|size| (Tracker::new(size).max_peers, View::new(size).max_holders));
    assert_eq!(bounds, [(512, 32), (512, 32), (1250, 32), (2048, 64), (2048, 64)]);
}

#[test]
fn equally_loaded_holders_are_named_in_turn() {
    let mut tracker = Tracker::new(1);
    (0..32).for_each(|n| tracker.record(peer(n), &mib(0, 16).into(), 0, at(0)));
    let named = (0..100).flat_map(|_| tracker.holders(None)).map(|holder| holder.peer);
    assert_eq!(named.collect::<std::collections::BTreeSet<_>>().len(), 32);
}

#[test]
fn peer_that_is_behind_is_the_last_choice() {
    let mut tracker = Tracker::new(1);
    tracker.record(peer(1), &mib(0, 64).into(), 9, at(0));
    tracker.record(peer(2), &mib(0, 16).into(), 0, at(0));
    tracker.record(peer(3), &mib(0, 64).into(), 5, at(0));
    assert_eq!(
        decide(&mut tracker, Some(peer(1)), mib(0, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Redirect(peer(3))
    );
    assert_eq!(
        decide(&mut tracker, None, mib(0, 16), BestSource::ThisNode, 9, at(0)),
        PeerDecision::Redirect(peer(2)),
        "good enough for a new requester"
    );
    let named: Vec<_> = tracker.holders(Some(peer(1))).into_iter().map(|holder| holder.peer).collect();
    assert_eq!(named, [peer(3), peer(2)]);
    let mut view = View::new(1);
    tracker.holders(Some(peer(1))).iter().for_each(|holder| view.learn(holder));
    assert_eq!(view.pick(0, 64 * MIB, at(0), 1), Some(peer(3)));
    assert_eq!(view.pick(0, 0, at(0), 1), Some(peer(2)));
}

#[test]
fn peer_with_a_low_rate_is_the_last_choice() {
    let mut tracker = Tracker::new(1);
    for n in 1..=10 {
        tracker.record(peer(n), &Spans::default(), 0, at(0));
        let reached = if n == 1 { 4 } else { 64 };
        tracker.record(peer(n), &mib(0, reached).into(), if n == 1 { 0 } else { 5 }, at(500));
    }
    assert!(matches!(
        decide(&mut tracker, None, mib(0, 16), BestSource::ThisNode, 9, at(500)),
        PeerDecision::Redirect(to) if to != peer(1)
    ));
    assert!(tracker.holders(None).iter().all(|holder| holder.peer != peer(1)));
    assert_eq!(
        decide(&mut tracker, None, mib(0, 16), BestSource::ThisNode, 4, at(500)),
        PeerDecision::Serve,
        "rather from this node than from the slow peer"
    );
}

#[test]
fn least_loaded_holder_of_the_byte_is_picked() {
    let mut view = View::new(1);
    let holder = |n, load, have: Span| Holder { peer: peer(n), load, have: have.into() };
    view.learn(&holder(1, 3, mib(0, 64)));
    view.learn(&holder(2, 1, mib(0, 32)));
    assert_eq!(view.pick(0, 0, at(0), 1), Some(peer(2)));
    assert_eq!(view.pick(40 * MIB, 0, at(0), 1), Some(peer(1)));
    assert_eq!(view.pick(64 * MIB, 0, at(0), 1), None);
    (0..3).for_each(|_| view.begin(peer(2)));
    assert_eq!(view.pick(0, 0, at(0), 1), Some(peer(1)));
    view.end(Contribution { peer: peer(2), claim: Claim::Verified, total: 64 << 20, span: mib(0, 16), checksum: 1 });
    assert_eq!(view.contributions().len(), 1);
    view.mark_refused(peer(1), at(0));
    assert_eq!(view.pick(40 * MIB, 0, at(100), 1), None);
    assert_eq!(view.pick(40 * MIB, 0, at(300), 1), Some(peer(1)));
    view.mark_failed(peer(1), at(300));
    assert_eq!(view.pick(40 * MIB, 0, at(60_000), 1), None, "until it reports again what it has");
}

#[test]
fn peer_that_was_too_slow_is_not_picked_until_forgiven() {
    let mut view = View::new(1);
    view.learn(&Holder { peer: peer(1), load: 0, have: mib(0, 64).into() });
    view.mark_too_slow(peer(1), at(0));
    view.mark_interrupted(peer(1), at(0));
    assert!(view.is_too_slow(peer(1), at(299_999)) && !view.is_too_slow(peer(1), at(300_000)));
    assert_eq!(view.pick(0, 0, at(60_000), 1), None, "whatever else it did");
    view.forgive();
    assert_eq!(view.pick(0, 0, at(60_000), 1), Some(peer(1)));
}

#[test]
fn rarest_range_is_chosen_first() {
    let mut view = View::new(1);
    let ranges = [mib(0, 16), mib(16, 32), mib(32, 48), mib(48, 64)];
    assert_eq!(view.choose(&[], 0), None);
    assert_eq!(view.choose(&ranges, 5), Some(0), "in order where no peer has any");
    view.learn(&Holder { peer: peer(1), load: 0, have: mib(32, 40).into() });
    assert_eq!(view.choose(&ranges, 5), Some(2), "a peer is downloading it");
    view.learn(&Holder { peer: peer(1), load: 0, have: mib(0, 32).into() });
    view.learn(&Holder { peer: peer(2), load: 0, have: mib(0, 16).into() });
    assert_eq!(view.choose(&ranges, 5), Some(1), "one peer has it, two have the first");
}

#[test]
fn equally_loaded_holders_share_the_load() {
    let mut view = View::new(1);
    (0..4).for_each(|n| view.learn(&Holder { peer: peer(n), load: 0, have: mib(0, 16).into() }));
    let picked: std::collections::BTreeSet<_> = (0..100).filter_map(|lot| view.pick(0, 0, at(0), lot)).collect();
    assert_eq!(picked.len(), 4);
}
