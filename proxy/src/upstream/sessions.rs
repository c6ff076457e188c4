//! The session of each rule: its HTTP client, and what upstreams granted to it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::auth::TokenCache;
use super::credentials::ExternalCredentials;
use super::egress::EgressPolicy;
use super::http::UpstreamHttp;
use super::redirects::RedirectCache;
use crate::config::{Config, EgressConfig};
use crate::registries::{RepositoryRef, Rule, RuleTls, Rules};

/// HTTP clients of rules that came with the same configuration, and what upstreams granted to these rules.
pub(super) struct UpstreamSession {
    pub(super) http: Arc<UpstreamHttp>,
    pub(super) tokens: TokenCache,
    pub(super) redirects: RedirectCache,
}

/// The sessions of all rules. A request that began before a reload keeps the session of its rule, so that nothing that
/// was granted to the credentials of one rule serves another one.
pub(super) struct Sessions {
    by_rule: ArcSwap<ByRule>,
    /// Roots of all upstreams, and the name servers: a reload does not change them.
    config: Config,
    /// The latest HTTP clients, and the egress settings that they have.
    latest: Mutex<(EgressConfig, Arc<UpstreamHttp>)>,
}

/// By the ID of the rule.
type ByRule = HashMap<u64, (Weak<Rule>, Arc<UpstreamSession>)>;

/// The sessions of a changed configuration, ready to be applied.
pub(crate) struct ReloadedSessions {
    by_rule: ByRule,
    latest: (EgressConfig, Arc<UpstreamHttp>),
}

impl Sessions {
    /// Must run inside a tokio runtime, which drives DNS.
    pub(super) fn new(config: &Config, rules: &Rules) -> Result<Self, String> {
        let http = http(config, rules.iter())?;
        let by_rule = ArcSwap::from_pointee(by_rule(rules.iter(), &session(http.clone())));
        Ok(Self { by_rule, config: config.clone(), latest: Mutex::new((config.egress.clone(), http)) })
    }

    pub(super) fn of(&self, repo_ref: &RepositoryRef) -> Arc<UpstreamSession> {
        let sessions = self.by_rule.load();
        let (_, session) = sessions.get(&repo_ref.rule.id).expect("a rule in use has a session");
        session.clone()
    }

    /// Each session of a rule in use, once. A session without one is kept until the next reload.
    pub(super) fn distinct(&self) -> Vec<Arc<UpstreamSession>> {
        let mut distinct: Vec<Arc<UpstreamSession>> = Vec::new();
        for (_, session) in self.by_rule.load().values().filter(|(rule, _)| rule.strong_count() > 0) {
            if !distinct.iter().any(|known| Arc::ptr_eq(known, session)) {
                distinct.push(session.clone());
            }
        }
        distinct
    }

    /// The sessions for other rules: new rules get one of their own, rules in use keep theirs. Must run inside a tokio
    /// runtime. [`Self::store`] applies them.
    pub(super) fn reloaded(&self, egress: &EgressConfig, next: &Rules) -> Result<ReloadedSessions, String> {
        let current = self.by_rule.load();
        let new: Vec<_> = next.iter().filter(|rule| !current.contains_key(&rule.id)).collect();
        let mut sessions = ByRule::clone(&current);
        sessions.retain(|_, (rule, _)| rule.strong_count() > 0);
        let mut latest = self.latest.lock().clone();
        if !new.is_empty() {
            // Clients are expensive to create. Those with certificates in files read these again.
            let can_share = latest.0 == *egress
                && self.config.tls.ca.is_none()
                && new.iter().all(|rule| rule.tls == RuleTls::default());
            if !can_share {
                let config = Config { egress: egress.clone(), ..self.config.clone() };
                latest = (egress.clone(), http(&config, new.iter().copied())?);
            }
            sessions.extend(by_rule(new.into_iter(), &session(latest.1.clone())));
        }
        Ok(ReloadedSessions { by_rule: sessions, latest })
    }

    /// New requests use these sessions.
    pub(super) fn store(&self, sessions: ReloadedSessions) {
        self.by_rule.store(Arc::new(sessions.by_rule));
        *self.latest.lock() = sessions.latest;
    }

    /// Reloads the client certificates for upstreams. Blocks on the disk.
    pub(super) fn reload_certificates(&self) -> Result<(), String> {
        let mut clients: Vec<_> = self.distinct().iter().map(|session| session.http.clone()).collect();
        // Sessions share clients.
        clients.sort_by_key(|http| Arc::as_ptr(http).addr());
        clients.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let errors: Vec<String> = clients.iter().flat_map(|http| http.reload()).collect();
        if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
    }
}

fn http<'a>(config: &Config, rules: impl Iterator<Item = &'a Arc<Rule>>) -> Result<Arc<UpstreamHttp>, String> {
    let settings = rules.map(|rule| &rule.tls);
    UpstreamHttp::new(EgressPolicy::new(config)?, settings, config.tls.ca.as_deref()).map(Arc::new)
}

fn session(http: Arc<UpstreamHttp>) -> Arc<UpstreamSession> {
    let external = ExternalCredentials::new(http.cloud.clone());
    Arc::new(UpstreamSession { http, tokens: TokenCache::new(external), redirects: RedirectCache::new() })
}

fn by_rule<'a>(rules: impl Iterator<Item = &'a Arc<Rule>>, session: &Arc<UpstreamSession>) -> ByRule {
    rules.map(|rule| (rule.id, (Arc::downgrade(rule), session.clone()))).collect()
}
