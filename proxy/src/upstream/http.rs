//! HTTP clients by egress scope, and redirects followed by hand.

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

/// The limit of Go's HTTP client, which container clients use. More: redirect loops last longer. Fewer: chains fail
/// that clients accept without dray.
const MAX_REDIRECTS: usize = 10;

/// Header lines of a response. The library's default is 100, and registries behind several proxies send more.
const MAX_HEADERS: usize = 512;

/// All HTTP clients that the rules need.
pub(super) struct UpstreamHttp {
    egress: EgressPolicy,
    identities: Vec<Arc<Identity>>,
    recent_hosts: RecentHosts,
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
    pub(super) connect_timeout: ConnectTimeout,
}

/// How long to wait for a connection, by whether another upstream follows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum ConnectTimeout {
    LastResort,
    OthersFollow,
}

/// Whether a connection is kept after its request.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum AfterUse {
    Keep,
    Close,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    scope: EgressScope,
    tls: RuleTls,
    connect_timeout: ConnectTimeout,
    after_use: AfterUse,
}

/// Idle connections of one host. More: more memory. Fewer: parallel ranges open new connections.
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
    /// One client for each egress scope, connect timeout, connection reuse and TLS setting of a rule. `extra_ca` is
    /// trusted everywhere.
    pub(super) fn new<'a>(
        egress: EgressPolicy,
        rules: impl Iterator<Item = &'a RuleTls>,
        extra_ca: Option<&Path>,
    ) -> Result<Self, String> {
        let extra = extra_ca.map_or(Ok(Vec::new()), |ca| tls::certificates("tls.ca", ca))?;
        let proxies = Arc::new(EnvProxies::of_environment());
        let (mut clients, mut identities) = (HashMap::new(), Vec::new());
        for rule in rules.cloned().chain([RuleTls::default()]) {
            let identity = rule.client_cert.as_ref().map(tls::identity).transpose()?;
            identities.extend(identity.clone());
            // Redirect targets and token endpoints on other hosts do not get the client certificate.
            for (rule, identity) in [(rule.clone(), identity), (RuleTls { client_cert: None, ..rule }, None)] {
                if clients.keys().any(|known: &ClientKey| known.tls == rule) {
                    continue;
                }
                let roots = rule.ca.as_deref().map_or(Ok(Vec::new()), |ca| tls::certificates("registry.ca", ca))?;
                let config = tls::config(&extra, roots, identity)?;
                for scope in [EgressScope::Anywhere, EgressScope::Public, EgressScope::Allowed] {
                    for connect_timeout in [ConnectTimeout::LastResort, ConnectTimeout::OthersFollow] {
                        for after_use in [AfterUse::Keep, AfterUse::Close] {
                            let key = ClientKey { scope, tls: rule.clone(), connect_timeout, after_use };
                            let client = key.client(&egress, &proxies, config.clone())?;
                            clients.insert(key, client);
                        }
                    }
                }
            }
        }
        let cloud = cloud_client(&egress, proxies, tls::config(&extra, Vec::new(), None)?)?;
        Ok(Self { egress, identities, recent_hosts: RecentHosts::default(), clients, cloud })
    }

    /// Reloads all client certificates, and returns the errors: one that a changed rule no longer names must not keep others
    /// from being renewed.
    pub(super) fn reload(&self) -> Vec<String> {
        self.identities.iter().filter_map(|identity| identity.reload().err()).collect()
    }

    /// Checks an upstream from a client's request, as far as its name shows.
    pub(super) fn check_literal(&self, upstream: &Upstream) -> Result<(), EgressError> {
        Url::parse(&upstream.base()).map_or(Ok(()), |url| self.egress.check_literal(&url))
    }

    /// Whether an upstream's name has an address.
    pub(super) async fn resolves(&self, upstream: &Upstream) -> bool {
        match Url::parse(&upstream.base()) {
            Ok(url) => self.egress.resolves(&url).await,
            Err(_) => false,
        }
    }

    /// Sends a request and follows its redirects. Returns the final response and its URL.
    pub(super) async fn follow(
        &self,
        upstream_ref: UpstreamRef<'_>,
        mut replayable: ReplayableRequest<'_>,
        deadline: Instant,
    ) -> Result<(Response, Url), SourceError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(upstream_ref, &replayable, deadline).await?;
            if !is_redirect(&response) {
                return Ok((response, replayable.url));
            }
            let target = redirect_target(&replayable.url, response.headers())?;
            if target.origin() != replayable.url.origin() {
                // Signed URLs reject a second authorization, and no other host may see dray's.
                replayable.authorization = None;
            }
            replayable.url = target;
        }
        Err(SourceError::Malformed(format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// Sends a request without following redirects.
    pub(super) async fn send(
        &self,
        upstream_ref: UpstreamRef<'_>,
        replayable: &ReplayableRequest<'_>,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let at_home = replayable.url.as_str().starts_with(&format!("{}/", upstream_ref.upstream.base()));
        let scope = match upstream_ref.trust {
            UpstreamTrust::Configured if at_home => EgressScope::Anywhere,
            _ => {
                self.egress.check(&replayable.url).await.map_err(|blocked| SourceError::Blocked(blocked.to_string()))?
            }
        };
        let client_cert = upstream_ref.tls.client_cert.clone().filter(|_| at_home);
        let host = replayable.url.host_str().unwrap_or_default();
        let is_kept =
            || upstream_ref.trust == UpstreamTrust::Configured || self.recent_hosts.touch(host, Instant::now());
        let after_use = if is_kept() { AfterUse::Keep } else { AfterUse::Close };
        let tls = RuleTls { client_cert, ..upstream_ref.tls.clone() };
        let key = ClientKey { scope, tls, connect_timeout: upstream_ref.connect_timeout, after_use };
        let client = self
            .clients
            .get(&key)
            .ok_or_else(|| SourceError::Unreachable("no HTTP client for this TLS setting".into()))?;
        let mut request =
            client.request(replayable.method.clone(), replayable.url.clone()).headers(replayable.headers.clone());
        if let Some(authorization) = &replayable.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        if let Some(form) = &replayable.form {
            request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.clone());
        }
        let mut request = request.build().map_err(explain)?;
        let mut span = trace::begin("upstream request", trace::TraceSpanKind::Client);
        span.write(request.headers_mut());
        let result = match timeout_at(deadline, client.execute(request)).await {
            Err(_) => Err(SourceError::TimedOut),
            Ok(Ok(response)) => {
                if upstream_ref.trust == UpstreamTrust::Derived {
                    self.recent_hosts.record_response(host, Instant::now());
                }
                Ok(response)
            }
            Ok(Err(error)) => Err(explain(error)),
        };
        record_span(&mut span, replayable, &result);
        result
    }
}

impl ClientKey {
    fn client(
        &self,
        egress: &EgressPolicy,
        proxies: &Arc<EnvProxies>,
        tls: rustls::ClientConfig,
    ) -> Result<Client, String> {
        let proxies = proxies.clone();
        let max_idle = if self.after_use == AfterUse::Keep { MAX_IDLE_PER_HOST } else { 0 };
        Client::builder()
            .user_agent(USER_AGENT)
            // For a blob as cheap as HTTP/2, without flow-control windows, and with parallel sockets.
            .http1_only()
            .http1_max_headers(MAX_HEADERS)
            // As lenient as Go's client: an invalid header must not fail the body.
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_ignore_invalid_headers_in_responses(true)
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(self.connect_timeout.duration())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(max_idle)
            .dns_resolver(egress.resolver(self.scope))
            .no_proxy()
            .proxy(Proxy::custom(move |url| proxies.of(url)))
            .tls_backend_preconfigured(tls)
            .build()
            .map_err(|e| format!("the HTTP client cannot be built: {}", root_cause(&e)))
    }
}

/// The client of the clouds' token services.
fn cloud_client(egress: &EgressPolicy, proxies: Arc<EnvProxies>, tls: rustls::ClientConfig) -> Result<Client, String> {
    Client::builder()
        .user_agent(USER_AGENT)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(SERVICE_TIMEOUT)
        .dns_resolver(egress.resolver(EgressScope::Anywhere))
        .no_proxy()
        // Without TLS it is the metadata service of this machine or an agent on it: no proxy.
        .proxy(Proxy::custom(move |url| proxies.of(url).filter(|_| url.scheme() == "https")))
        .tls_backend_preconfigured(tls)
        .build()
        .map_err(|e| format!("the HTTP client cannot be built: {}", root_cause(&e)))
}

/// Whether a response is a redirect that names a target.
pub(super) fn is_redirect(response: &Response) -> bool {
    matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The target of a redirect: absolute, relative, or without a scheme. Bytes outside ASCII are percent-encoded, since
/// registries behind object stores send raw file names.
pub(super) fn redirect_target(from: &Url, headers: &HeaderMap) -> Result<Url, SourceError> {
    let location = headers.get(LOCATION).map(|value| percent_encode(value.as_bytes(), &AsciiSet::EMPTY).to_string());
    let target = location.and_then(|location| from.join(&location).ok());
    target.ok_or_else(|| SourceError::Malformed("a redirect without a usable Location".into()))
}

/// Records no path: it may be signed.
fn record_span(
    span: &mut trace::TraceSpan,
    replayable: &ReplayableRequest<'_>,
    result: &Result<Response, SourceError>,
) {
    span.rename(|| format!("{} {}", replayable.method, replayable.url.host_str().unwrap_or_default()));
    span.tell(|| {
        let host = ("server.address", replayable.url.host_str().unwrap_or_default().to_owned().into());
        let port = ("server.port", u64::from(replayable.url.port_or_known_default().unwrap_or_default()).into());
        let status = result.as_ref().ok().map(|response| u64::from(response.status().as_u16()));
        let method = ("http.request.method", replayable.method.to_string().into());
        let status = status.map(|status| ("http.response.status_code", status.into()));
        [host, port, method].into_iter().chain(status).collect()
    });
    match result {
        Ok(response) if response.status().is_server_error() => span.fail(|| response.status().to_string()),
        Ok(_) => {}
        Err(error) => span.fail(|| error.to_string()),
    }
}

impl ConnectTimeout {
    fn duration(self) -> Duration {
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
    // The resolver's error is wrapped in layers of connection errors.
    if let Some(blocked) = causes(&error).find_map(|cause| cause.downcast_ref::<EgressError>()) {
        return SourceError::Blocked(blocked.to_string());
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
