//! What the configuration says about clients, as one value: a request that meets a reload is judged by one configuration, not
//! by the logins of one and the rules of another.

use std::collections::HashSet;
use std::sync::Arc;

use super::browsers;
use super::clients::ClientLimits;
use super::logins::Logins;
use crate::config::Config;
use crate::registries::Rules;

/// The settings of one configuration for requests of clients.
pub struct ClientPolicy {
    pub(super) rules: Arc<Rules>,
    /// None: no login is required.
    pub(super) logins: Option<Arc<Logins>>,
    pub(super) limits: ClientLimits,
    /// Names under which browsers may reach this process, beside its addresses.
    pub(super) browser_names: HashSet<String>,
}

impl ClientPolicy {
    pub fn new(config: &Config, rules: Arc<Rules>, logins: Option<Arc<Logins>>) -> Self {
        let (limits, browser_names) = (ClientLimits::new(&config.access), browsers::names(config));
        Self { rules, logins, limits, browser_names }
    }
}
