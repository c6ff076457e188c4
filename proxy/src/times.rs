//! Timeouts, intervals and lifetimes that more than one module uses. Others are defined in the module that uses them.
//!
//! New code reuses one of these if its reason is the same: fewer times are easier to remember.

use std::time::Duration;

// Timeouts.

/// Timeout of an upstream request until its first byte. The request stays open for this long even if its client already
/// has a response: the result serves the next client. Longer: a registry that accepts connections but sends nothing
/// holds requests longer. Shorter: slower registries can never be pulled from.
pub const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(60);

/// Without a response, a byte or a read for this long, the other side is stalled. Longer: clients wait longer before
/// they fall back. Shorter: slow links count as dead.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout of a small request to a service, or of a short lock. Longer: a pull waits for a service that is down.
/// Shorter: requests fail on a loaded machine.
pub const SERVICE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a better response is awaited while another one is at hand: a copy, an older tag, other sources. Longer:
/// clients wait for slow upstreams although they could be served. Shorter: stale copies are served.
pub const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout to reach a source that another source follows, or for a response without work. Longer: a dead source costs
/// each pull more. Shorter: distant sources are skipped.
pub const REACH_TIMEOUT: Duration = Duration::from_millis(2500);

/// How long one source is awaited alone while an alternative is at hand. Users do not notice this delay. Longer: slow
/// sources are noticed. Shorter: distant sources get a second request in vain.
pub const ALTERNATIVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Timeout for a peer that only looks into its index. Longer: a slow peer delays each pull. Shorter: hits of distant
/// peers are missed.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_millis(500);

/// Grace period for a state that is about to change: the last reader of a download, the rest of a request, the first
/// peers. Longer: nothing is gained. Shorter: work is repeated that was about to finish.
pub const COMPLETION_GRACE: Duration = Duration::from_secs(5);

/// Timeout for closing a connection, or for writing the last lines of a log. Longer: a dead connection holds its slot
/// longer. Shorter: a last response may be lost.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A transfer without a byte for this long makes no progress. Longer: lent ranges are recalled late. Shorter: short
/// pauses count as failures.
pub const NO_PROGRESS_TIMEOUT: Duration = Duration::from_secs(3);

// Intervals.

/// Interval for checking a state that changes all the time. Longer: changes are noticed late. Shorter: checks cost
/// more.
pub const TICK: Duration = Duration::from_millis(100);

/// The first delay after a failure. Each further one is twice as long, up to [`MAX_RETRY_DELAY`].
pub const FIRST_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between attempts that repeat until they succeed. Longer: recovery is noticed later.
pub const MAX_RETRY_DELAY: Duration = Duration::from_secs(30);

/// A failed action may be repeated after this time. Longer: a short failure lasts longer. Shorter: each request repeats
/// what cannot succeed.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// A failed choice is avoided for this long while another one exists. Longer: recovery is noticed later. Shorter:
/// failures repeat.
pub const PAUSE: Duration = Duration::from_secs(10);

/// Interval for rereading files that change rarely and send no notification. Longer: changes apply later.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

// Lifetimes.

/// An idle connection that dray opened is closed after this time, which is shorter than that of servers. Longer: more
/// connections stay open unused. Shorter: pulls that follow each other connect again.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Lifetime where none is stated: a token (the distribution's token specification), the target of a redirect, a file
/// with a secret. Longer: changes apply late. Shorter: each pull sends more requests.
pub const DEFAULT_TTL: Duration = Duration::from_secs(60);

/// The access of a client to a repository is checked again after this time, whatever the lifetime of its token. Longer:
/// revoked access lasts longer. Shorter: the upstream gets more requests.
pub const AUTHORIZATION_TTL: Duration = Duration::from_secs(300);

/// Lifetime of an observation about an upstream, a peer or a digest. Longer: recovered upstreams and peers are avoided
/// for longer. Shorter: failing ones are tried more often.
pub const OBSERVATION_TTL: Duration = Duration::from_secs(600);

/// How often the last use of a cached object, and the last check of a tag, are stored on disk. Longer: after a restart
/// they count as older, by up to this time. Shorter: each use is a write.
pub const TOUCH_INTERVAL: Duration = Duration::from_secs(3600);

pub const HOUR: Duration = Duration::from_secs(3600);

pub const DAY: Duration = Duration::from_secs(24 * 3600);

/// The source of the time of day, for ages that outlive a process.
pub type WallClock = fn() -> std::time::SystemTime;
