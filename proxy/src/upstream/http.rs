//! HTTP clients by how far they may reach, and redirects followed by hand.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, Method};
use percent_encoding::{AsciiSet, percent_encode};
use reqwest::{Client, Proxy, Response};
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::egress::{EgressError, EgressPolicy, EgressScope};
use super::env_proxies::EnvProxies;
use super::recent_hosts::RecentHosts;
use super::tls;
use crate::config::Upstream;
use crate::identity::Identity;
use crate::registries::{RuleTls, UpstreamTrust};
use crate::source::{SourceError, causes, root_cause};
use crate::times::{ALTERNATIVE_TIMEOUT, IDLE_TIMEOUT, REACH_TIMEOUT, SERVICE_TIMEOUT};
use crate::trace;

const USER_AGENT: &str = concat!("dray/", env!("CARGO_PKG_VERSION"));

/// As many hops as Go's HTTP client follows, which is what container clients are built on.
const MAX_REDIRECTS: usize = 10;

/// Header lines of a response. The library's own limit is 100, and registries behind several proxies send more.
const MAX_HEADERS: usize = 512;

/// All clients that the rules need.
pub(super) struct UpstreamHttp {
    guard: EgressPolicy,
    identities: Vec<Arc<Identity>>,
    kept_hosts: RecentHosts,
    clients: HashMap<ClientKey, Client>,
    /// For the token services of clouds.
    pub(super) cloud: Client,
}

/// The upstream that a request belongs to, through all its redirects.
#[derive(Clone, Copy)]
pub(super) struct UpstreamRef<'a> {
    pub(super) upstream: &'a Upstream,
    pub(super) trust: UpstreamTrust,
    pub(super) tls: &'a RuleTls,
    pub(super) patience: ConnectTimeout,
}

/// How long to wait for a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum ConnectTimeout {
    LastResort,
    OthersFollow,
}

/// What becomes of a connection after its request.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum AfterUse {
    Keep,
    Close,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    reach: EgressScope,
    tls: RuleTls,
    patience: ConnectTimeout,
    after_use: AfterUse,
}

/// Idle connections of one host. More: more memory. Fewer: parallel ranges connect anew.
const MAX_IDLE_PER_HOST: usize = 16;

/// A request that can be sent again.
pub(super) struct ReplayableRequest<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: &'a HeaderMap,
    pub(super) authorization: Option<HeaderValue>,
    /// The body of a POST to a token endpoint.
    pub(super) form: Option<String>,
}

impl UpstreamHttp {
    /// One client for each reach and each rule's way to prove identities. `extra_ca` is trusted everywhere.
    pub(super) fn new<'a>(
        guard: EgressPolicy,
        rules: impl Iterator<Item = &'a RuleTls>,
        extra_ca: Option<&Path>,
    ) -> Result<Self, String> {
        let extra = extra_ca.map_or(Ok(Vec::new()), |ca| tls::certificates("tls.ca", ca))?;
        let proxies = Arc::new(EnvProxies::of_environment());
        let (mut clients, mut identities) = (HashMap::new(), Vec::new());
        for rule in rules.cloned().chain([RuleTls::default()]) {
            let identity = rule.client_cert.as_ref().map(tls::identity).transpose()?;
            identities.extend(identity.clone());
            // Redirects and token endpoints elsewhere are not shown the certificate.
            for (rule, identity) in [(rule.clone(), identity), (RuleTls { client_cert: None, ..rule }, None)] {
                if clients.keys().any(|known: &ClientKey| known.tls == rule) {
                    continue;
                }
                let roots = rule.ca.as_deref().map_or(Ok(Vec::new()), |ca| tls::certificates("registry.ca", ca))?;
                let config = tls::config(&extra, roots, identity)?;
                for reach in [EgressScope::Anywhere, EgressScope::Public, EgressScope::Allowed] {
                    for patience in [ConnectTimeout::LastResort, ConnectTimeout::OthersFollow] {
                        for after_use in [AfterUse::Keep, AfterUse::Close] {
                            let key = ClientKey { reach, tls: rule.clone(), patience, after_use };
                            let client = key.client(&guard, &proxies, config.clone())?;
                            clients.insert(key, client);
                        }
                    }
                }
            }
        }
        let cloud = cloud_client(&guard, proxies, tls::config(&extra, Vec::new(), None)?)?;
        Ok(Self { guard, identities, kept_hosts: RecentHosts::default(), clients, cloud })
    }

    /// Reads the certificates again that upstreams are shown.
    pub(super) fn reload(&self) -> Result<(), String> {
        self.identities.iter().try_for_each(|identity| identity.reload())
    }

    /// Why an upstream that is only named by clients is refused, where its name tells.
    pub(super) fn refuses_literally(&self, upstream: &Upstream) -> Result<(), EgressError> {
        Url::parse(&upstream.base()).map_or(Ok(()), |url| self.guard.refuses_literally(&url))
    }

    /// Whether an upstream's name has an address.
    pub(super) async fn resolves(&self, upstream: &Upstream) -> bool {
        match Url::parse(&upstream.base()) {
            Ok(url) => self.guard.resolves(&url).await,
            Err(_) => false,
        }
    }

    /// Sends a request and follows its redirects until an answer that is none. Returns the answer
    /// with the URL that gave it.
    pub(super) async fn follow(
        &self,
        home: UpstreamRef<'_>,
        mut ask: ReplayableRequest<'_>,
        deadline: Instant,
    ) -> Result<(Response, Url), SourceError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(home, &ask, deadline).await?;
            if !is_redirect(&response) {
                return Ok((response, ask.url));
            }
            let target = redirect_target(&ask.url, response.headers())?;
            if target.origin() != ask.url.origin() {
                // Signed URLs reject a second authorization, and nobody else may see ours.
                ask.authorization = None;
            }
            ask.url = target;
        }
        Err(SourceError::Malformed(format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// Sends a request without following anything.
    pub(super) async fn send(
        &self,
        home: UpstreamRef<'_>,
        ask: &ReplayableRequest<'_>,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let at_home = ask.url.as_str().starts_with(&format!("{}/", home.upstream.base()));
        let reach = match home.trust {
            UpstreamTrust::Written if at_home => EgressScope::Anywhere,
            _ => self.guard.check(&ask.url).await.map_err(|refused| SourceError::Guarded(refused.to_string()))?,
        };
        let client_cert = home.tls.client_cert.clone().filter(|_| at_home);
        let host = ask.url.host_str().unwrap_or_default();
        let is_kept = || home.trust == UpstreamTrust::Written || self.kept_hosts.keeps(host, Instant::now());
        let after_use = if is_kept() { AfterUse::Keep } else { AfterUse::Close };
        let tls = RuleTls { client_cert, ..home.tls.clone() };
        let key = ClientKey { reach, tls, patience: home.patience, after_use };
        let client = self.clients.get(&key).ok_or_else(|| SourceError::Unreachable("no client".into()))?;
        let mut request = client.request(ask.method.clone(), ask.url.clone()).headers(ask.headers.clone());
        if let Some(authorization) = &ask.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        if let Some(form) = &ask.form {
            request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.clone());
        }
        let mut request = request.build().map_err(explain)?;
        let mut span = trace::begin("ask an origin", trace::TraceSpanKind::Client);
        span.write(request.headers_mut());
        let answer = match timeout_at(deadline, client.execute(request)).await {
            Err(_) => Err(SourceError::TimedOut),
            Ok(Ok(response)) => {
                if home.trust == UpstreamTrust::Derived {
                    self.kept_hosts.answered(host, Instant::now());
                }
                Ok(response)
            }
            Ok(Err(error)) => Err(explain(error)),
        };
        tell(&mut span, ask, &answer);
        answer
    }
}

impl ClientKey {
    fn client(
        &self,
        guard: &EgressPolicy,
        proxies: &Arc<EnvProxies>,
        tls: rustls::ClientConfig,
    ) -> Result<Client, String> {
        let proxies = proxies.clone();
        let max_idle = if self.after_use == AfterUse::Keep { MAX_IDLE_PER_HOST } else { 0 };
        Client::builder()
            .user_agent(USER_AGENT)
            // Same cost as HTTP/2 for a blob, without its windows, and sockets in parallel.
            .http1_only()
            .http1_max_headers(MAX_HEADERS)
            // As Go's client reads them: what is wrong with one header is no reason to refuse the body.
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_ignore_invalid_headers_in_responses(true)
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(self.patience.connect_timeout())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(max_idle)
            .dns_resolver(guard.resolver(self.reach))
            .no_proxy()
            .proxy(Proxy::custom(move |url| proxies.of(url)))
            .tls_backend_preconfigured(tls)
            .build()
            .map_err(|e| format!("no HTTP client: {}", root_cause(&e)))
    }
}

/// The client of the clouds' token services.
fn cloud_client(guard: &EgressPolicy, proxies: Arc<EnvProxies>, tls: rustls::ClientConfig) -> Result<Client, String> {
    Client::builder()
        .user_agent(USER_AGENT)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(SERVICE_TIMEOUT)
        .dns_resolver(guard.resolver(EgressScope::Anywhere))
        .no_proxy()
        // What has no TLS is the metadata service of this very machine, or an agent on it.
        .proxy(Proxy::custom(move |url| proxies.of(url).filter(|_| url.scheme() == "https")))
        .tls_backend_preconfigured(tls)
        .build()
        .map_err(|e| format!("no HTTP client: {}", root_cause(&e)))
}

/// Whether a response is a redirect that names a target.
pub(super) fn is_redirect(response: &Response) -> bool {
    matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where a redirect leads: absolute, relative, or without a scheme. Bytes outside ASCII are percent-encoded, as
/// registries behind object stores send file names raw.
pub(super) fn redirect_target(from: &Url, headers: &HeaderMap) -> Result<Url, SourceError> {
    let location = headers.get(LOCATION).map(|value| percent_encode(value.as_bytes(), &AsciiSet::EMPTY).to_string());
    let target = location.and_then(|location| from.join(&location).ok());
    target.ok_or_else(|| SourceError::Malformed("a redirect without a usable Location".into()))
}

/// Never the path: it may be signed.
fn tell(span: &mut trace::TraceSpan, ask: &ReplayableRequest<'_>, answer: &Result<Response, SourceError>) {
    span.rename(|| format!("{} {}", ask.method, ask.url.host_str().unwrap_or_default()));
    span.tell(|| {
        let host = ("server.address", ask.url.host_str().unwrap_or_default().to_owned().into());
        let port = ("server.port", u64::from(ask.url.port_or_known_default().unwrap_or_default()).into());
        let status = answer.as_ref().ok().map(|response| u64::from(response.status().as_u16()));
        let method = ("http.request.method", ask.method.to_string().into());
        let status = status.map(|status| ("http.response.status_code", status.into()));
        [host, port, method].into_iter().chain(status).collect()
    });
    match answer {
        Ok(response) if response.status().is_server_error() => span.fail(|| response.status().to_string()),
        Ok(_) => {}
        Err(error) => span.fail(|| error.to_string()),
    }
}

impl ConnectTimeout {
    fn connect_timeout(self) -> Duration {
        match self {
            Self::LastResort => REACH_TIMEOUT,
            Self::OthersFollow => ALTERNATIVE_TIMEOUT,
        }
    }
}

/// An error of the client library, without the URL: it may be signed.
fn explain(error: reqwest::Error) -> SourceError {
    let error = error.without_url();
    let text = root_cause(&error);
    // The resolver's refusal comes wrapped in layers of connection errors.
    if let Some(refused) = causes(&error).find_map(|cause| cause.downcast_ref::<EgressError>()) {
        return SourceError::Guarded(refused.to_string());
    }
    if error.is_timeout() && !error.is_connect() {
        return SourceError::TimedOut;
    }
    if !error.is_connect() {
        return SourceError::Interrupted(text);
    }
    match tls::advice(&error) {
        Some(advice) => SourceError::Unreachable(format!("{text}: {advice}")),
        None => SourceError::Unreachable(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirect_target_of_every_form_is_found() {
        let from = Url::parse("https://reg.io/v2/a/blobs/x?ns=y").unwrap();
        let target = |location: &[u8]| {
            let value = HeaderValue::from_bytes(location).unwrap();
            redirect_target(&from, &HeaderMap::from_iter([(LOCATION, value)])).ok().map(String::from)
        };
        for (location, want) in [
            (&b"https://cdn.io/a%2Fb?sig=1"[..], "https://cdn.io/a%2Fb?sig=1"),
            (b"/blobs/x", "https://reg.io/blobs/x"),
            (b"//cdn.io/x", "https://cdn.io/x"),
            (b"../y", "https://reg.io/v2/a/y"),
            (b"https://cdn.io/caf\xc3\xa9", "https://cdn.io/caf%C3%A9"),
            (b"https://cdn.io/caf\xe9", "https://cdn.io/caf%E9"),
        ] {
            assert_eq!(target(location).as_deref(), Some(want));
        }
        assert_eq!(target(b"https://"), None);
        assert!(redirect_target(&from, &HeaderMap::new()).is_err());
    }
}
