//! The times that more than one part of dray waits, pauses or remembers. Those of one part stand beside what they bound.
//!
//! A new part takes one of these if its reason is the same: fewer times are easier to hold in the head.

use std::time::Duration;

// How long somebody waits.

/// Largest time of one upstream request until its first byte. A slow registry is asked once, and the request stays open for this
/// long, also when the client that caused it was answered: its result serves the next one. Longer: a registry that accepts
/// connections and says nothing holds requests longer. Shorter: slower registries can never be pulled from.
pub const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(60);

/// No response, no byte or no reader for this long: the other side is stalled. Longer: clients wait longer before they fall
/// back. Shorter: slow links are taken for dead.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A small request to a service that answers at once, or a lock that is held for a moment. Longer: a pull waits for what is
/// down. Shorter: a loaded machine is refused.
pub const SERVICE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the better of two answers is waited for, where the other one is at hand: a copy, an older tag, other sources. Longer:
/// clients wait for slow upstreams although they could be served. Shorter: copies are served that are out of date.
pub const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// To reach a source, or for a response that needs no work, where another source follows. Longer: a dead source costs each pull
/// more. Shorter: distant sources are passed over.
pub const REACH_TIMEOUT: Duration = Duration::from_millis(2500);

/// How long one source is waited for alone, where an older answer or another source is at hand: no user notices it. Longer: slow
/// sources are noticed. Shorter: sources that are only distant are asked twice.
pub const ALTERNATIVE_TIMEOUT: Duration = Duration::from_secs(1);

/// For a peer that only has to look at what it has.
pub const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

/// What is about to end, or to come, has this long: the last reader of a fill, the rest of a request, the first peers. Longer:
/// nothing is gained by it. Shorter: what would have come is begun again.
pub const GRACE: Duration = Duration::from_secs(5);

/// For the end of a connection, or the last lines of a log.
pub const FAREWELL: Duration = Duration::from_secs(1);

/// Nothing has moved for this long in what usually moves all the time.
pub const STILL: Duration = Duration::from_secs(3);

// How long a pause is.

/// How often something is looked at that changes all the time. Longer: changes are seen late. Shorter: looking costs more.
pub const TICK: Duration = Duration::from_millis(100);

/// The first pause after a failure. Each further one is twice as long, up to [`LONGEST_PAUSE`].
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause of what is tried again until it works. Longer: what works again is found out later.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What failed is tried again after this long by whoever needs it. Longer: a short failure is felt for longer. Shorter: each
/// request repeats what cannot work.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// What did not work is avoided for this long where there is another way.
pub const PAUSE: Duration = Duration::from_secs(10);

/// How often files are looked at that change rarely and tell nobody.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

// How long something is believed or kept.

/// An idle connection that dray opened: shorter than servers keep theirs. Longer: more connections stay open for nothing. Shorter:
/// pulls that follow each other connect anew.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// For how long something is good that does not say so, such as a token (the distribution's token specification), a URL that a
/// redirect named, or a file with a secret. Longer: changes are seen late. Shorter: each pull asks again.
pub const DEFAULT_TTL: Duration = Duration::from_secs(60);

/// What a client may pull is looked at again after this, whatever its token says. Longer: rights that were taken away hold for
/// longer. Shorter: the registry is asked more often.
pub const RIGHTS_TTL: Duration = Duration::from_secs(300);

/// For how long it is remembered what was observed of an upstream, a peer or a digest. Longer: those that recover are avoided for
/// longer. Shorter: those that do not are tried more often.
pub const OBSERVATION_TTL: Duration = Duration::from_secs(600);

/// A cached object's time of use, and a tag's of its last check, are written to the disk this often. Longer: after a restart they
/// count as older than they are, by up to this time. Shorter: each use is a write.
pub const TOUCH_INTERVAL: Duration = Duration::from_secs(3600);

pub const HOUR: Duration = Duration::from_secs(3600);

pub const DAY: Duration = Duration::from_secs(24 * 3600);
