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

/// A question, and where whoever asks goes.
fn direct(
    tracker: &mut Tracker,
    asker: Option<SocketAddr>,
    span: Span,
    comes: BestSource,
    sending: u32,
    now: Time,
) -> PeerDecision {
    let direction = tracker.direct(asker, span, comes, sending, now);
    tracker.expect(asker, span, now);
    direction
}

#[test]
fn a_busy_node_sends_on_to_whoever_gets_the_bytes_now() {
    let mut tracker = Tracker::new(1);
    for n in 1..=3 {
        tracker.heard(peer(n), &Spans::default(), 0, at(0));
    }
    assert_eq!(
        direct(&mut tracker, Some(peer(1)), mib(0, 16), BestSource::Here, 1, at(0)),
        PeerDecision::Answer,
        "few"
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(2)), mib(0, 16), BestSource::Here, 6, at(0)),
        PeerDecision::Redirect(peer(1))
    );
    tracker.heard(peer(1), &Spans::default(), 6, at(0));
    assert_eq!(
        direct(&mut tracker, Some(peer(3)), mib(0, 16), BestSource::Here, 6, at(0)),
        PeerDecision::Redirect(peer(2)),
        "sent on itself"
    );
    assert_eq!(
        direct(&mut tracker, None, mib(0, 16), BestSource::Here, 0, at(0)),
        PeerDecision::Answer,
        "no busier than the others"
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(2)), mib(16, 32), BestSource::Here, 9, at(0)),
        PeerDecision::Answer,
        "nobody else has that"
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(1)), mib(0, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Answer,
        "all others wait for it"
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(3)), mib(0, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Redirect(peer(2)),
        "nor to itself"
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(2)), mib(0, 16), BestSource::Here, 9, at(20_000)),
        PeerDecision::Answer,
        "it never came"
    );
    assert!(tracker.holders(None).is_empty(), "nobody has said that it has any");
}

#[test]
fn a_thousand_who_ask_at_once_are_a_tree_and_no_chain() {
    let mut tracker = Tracker::new(1000);
    // Through how many each range comes to each, and how much each sends.
    let mut hops = std::collections::HashMap::new();
    let mut sent = std::collections::HashMap::<_, u32>::new();
    let mut sending = 0;
    for n in 0..1000 {
        for nth in 0..4 {
            let span = mib(nth * 16, (nth + 1) * 16);
            tracker.heard(peer(n), &Spans::default(), 0, at(0));
            let from = match direct(&mut tracker, Some(peer(n)), span, BestSource::Here, sending, at(0)) {
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
fn nobody_is_sent_to_those_who_wait_for_it() {
    let mut tracker = Tracker::new(1);
    (1..=3).for_each(|n| tracker.heard(peer(n), &Spans::default(), 0, at(0)));
    // The first gets the beginning only, in this node's stead; the second follows it, for all.
    assert_eq!(tracker.direct(Some(peer(1)), mib(0, 16), BestSource::Here, 9, at(0)), PeerDecision::Answer);
    tracker.expect(Some(peer(1)), mib(0, 2), at(0));
    assert_eq!(
        direct(&mut tracker, Some(peer(2)), mib(0, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Redirect(peer(1))
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(1)), mib(2, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Answer,
        "the second waits for that as well"
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(3)), mib(2, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Redirect(peer(1))
    );
    assert_eq!(
        direct(&mut tracker, Some(peer(1)), mib(2, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Answer,
        "again"
    );
    tracker.heard(peer(2), &mib(0, 16).into(), 0, at(0));
    assert_eq!(
        direct(&mut tracker, Some(peer(1)), mib(2, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Redirect(peer(2))
    );
}

#[test]
fn holders_are_told_of_least_loaded_first_and_bounded() {
    let mut tracker = Tracker::new(1);
    for n in 0..3000 {
        tracker.heard(peer(n), &mib(0, 16).into(), 3000 - u32::from(n), at(n.into()));
    }
    assert_eq!(tracker.peers.len(), 512);
    let told: Vec<_> = tracker.holders(Some(peer(2999))).into_iter().map(|holder| holder.peer).collect();
    assert_eq!(told, (2991..2999).rev().map(peer).collect::<Vec<_>>());
}

#[test]
fn what_a_peer_says_is_bounded() {
    let (mut tracker, mut view) = (Tracker::new(1), View::new(1));
    for nth in 0..10_000 {
        let have: Spans = Span { start: nth * 10, end: nth * 10 + 1 }.into();
        tracker.heard(peer(1), &have, 0, at(0));
        view.learn(&Holder { peer: peer(1), load: 0, have });
    }
    assert!(tracker.peers[&peer(1)].have.iter().count() <= MAX_SPANS);
    assert!(view.peers[&peer(1)].have.iter().count() <= MAX_SPANS);
}

#[test]
fn a_large_cluster_is_remembered_better() {
    let bounds = [1, 2_000, 5_000, 10_000, 1_000_000].map(|size| (Tracker::new(size).most, View::new(size).most));
    assert_eq!(bounds, [(512, 32), (512, 32), (1250, 32), (2048, 64), (2048, 64)]);
}

#[test]
fn equals_are_told_of_in_turn() {
    let mut tracker = Tracker::new(1);
    (0..32).for_each(|n| tracker.heard(peer(n), &mib(0, 16).into(), 0, at(0)));
    let told = (0..100).flat_map(|_| tracker.holders(None)).map(|holder| holder.peer);
    assert_eq!(told.collect::<std::collections::BTreeSet<_>>().len(), 32);
}

#[test]
fn the_slow_end_up_as_leaves() {
    let mut tracker = Tracker::new(1);
    tracker.heard(peer(1), &mib(0, 64).into(), 9, at(0));
    tracker.heard(peer(2), &mib(0, 16).into(), 0, at(0));
    tracker.heard(peer(3), &mib(0, 64).into(), 5, at(0));
    assert_eq!(
        direct(&mut tracker, Some(peer(1)), mib(0, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Redirect(peer(3))
    );
    assert_eq!(
        direct(&mut tracker, None, mib(0, 16), BestSource::Here, 9, at(0)),
        PeerDecision::Redirect(peer(2)),
        "good enough for a new one"
    );
    let told: Vec<_> = tracker.holders(Some(peer(1))).into_iter().map(|holder| holder.peer).collect();
    assert_eq!(told, [peer(3), peer(2)]);
    let mut view = View::new(1);
    tracker.holders(Some(peer(1))).iter().for_each(|holder| view.learn(holder));
    assert_eq!(view.pick(0, 64 * MIB, at(0), 1), Some(peer(3)));
    assert_eq!(view.pick(0, 0, at(0), 1), Some(peer(2)));
}

#[test]
fn who_gets_it_slowly_is_asked_last_by_those_who_have_less() {
    let mut tracker = Tracker::new(1);
    for n in 1..=10 {
        tracker.heard(peer(n), &Spans::default(), 0, at(0));
        let reached = if n == 1 { 4 } else { 64 };
        tracker.heard(peer(n), &mib(0, reached).into(), if n == 1 { 0 } else { 5 }, at(500));
    }
    assert!(matches!(
        direct(&mut tracker, None, mib(0, 16), BestSource::Here, 9, at(500)),
        PeerDecision::Redirect(to) if to != peer(1)
    ));
    assert!(tracker.holders(None).iter().all(|holder| holder.peer != peer(1)));
    assert_eq!(
        direct(&mut tracker, None, mib(0, 16), BestSource::Here, 4, at(500)),
        PeerDecision::Answer,
        "rather from here than from the slow one"
    );
}

#[test]
fn the_least_loaded_that_is_ahead_is_picked() {
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
    view.refused(peer(1), at(0));
    assert_eq!(view.pick(40 * MIB, 0, at(100), 1), None);
    assert_eq!(view.pick(40 * MIB, 0, at(300), 1), Some(peer(1)));
    view.broke(peer(1), at(300));
    assert_eq!(view.pick(40 * MIB, 0, at(60_000), 1), None, "until it says again what it has");
}

#[test]
fn who_hardly_sends_is_left_alone_unless_there_is_nobody_else() {
    let mut view = View::new(1);
    view.learn(&Holder { peer: peer(1), load: 0, have: mib(0, 64).into() });
    view.crawled(peer(1), at(0));
    view.left(peer(1), at(0));
    assert!(view.crawls(peer(1), at(299_999)) && !view.crawls(peer(1), at(300_000)));
    assert_eq!(view.pick(0, 0, at(60_000), 1), None, "whatever else it did");
    view.forgive();
    assert_eq!(view.pick(0, 0, at(60_000), 1), Some(peer(1)));
}

#[test]
fn what_is_rare_is_fetched_first() {
    let mut view = View::new(1);
    let ranges = [mib(0, 16), mib(16, 32), mib(32, 48), mib(48, 64)];
    assert_eq!(view.choose(&[], 0), None);
    assert_eq!(view.choose(&ranges, 5), Some(0), "in order where nobody has any");
    view.learn(&Holder { peer: peer(1), load: 0, have: mib(32, 40).into() });
    assert_eq!(view.choose(&ranges, 5), Some(2), "on its way to somebody");
    view.learn(&Holder { peer: peer(1), load: 0, have: mib(0, 32).into() });
    view.learn(&Holder { peer: peer(2), load: 0, have: mib(0, 16).into() });
    assert_eq!(view.choose(&ranges, 5), Some(1), "one has it, two have the other");
}

#[test]
fn equals_share_the_work() {
    let mut view = View::new(1);
    (0..4).for_each(|n| view.learn(&Holder { peer: peer(n), load: 0, have: mib(0, 16).into() }));
    let picked: std::collections::BTreeSet<_> = (0..100).filter_map(|lot| view.pick(0, 0, at(0), lot)).collect();
    assert_eq!(picked.len(), 4);
}
