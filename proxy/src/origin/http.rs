//! HTTP clients by how far they may reach, and redirects followed by hand.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, Method};
use reqwest::{Certificate, Client, Response};
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::guard::{Guard, Reach, Refused};
use crate::config::Upstream;
use crate::registries::Trust;
use crate::source::{SourceError, error_chain};
use crate::trace;

/// Time to reach a host: DNS, TCP and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(2500);

/// The same where another upstream stands ready.
const CONNECT_TIMEOUT_WITH_ALTERNATIVE: Duration = Duration::from_millis(1000);

const MAX_REDIRECTS: usize = 5;

/// All clients that the rules need.
pub(super) struct Http {
    guard: Guard,
    clients: HashMap<ClientKey, Client>,
}

/// The upstream that a request belongs to, through all its redirects.
#[derive(Clone, Copy)]
pub(super) struct Home<'a> {
    pub(super) upstream: &'a Upstream,
    pub(super) trust: Trust,
    pub(super) ca: Option<&'a Path>,
    pub(super) patience: Patience,
}

/// How long to wait for a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Patience {
    LastResort,
    OthersFollow,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    reach: Reach,
    ca: Option<PathBuf>,
    patience: Patience,
}

/// A request that can be sent again.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: &'a HeaderMap,
    pub(super) authorization: Option<HeaderValue>,
    /// The body of a POST to a token endpoint.
    pub(super) form: Option<String>,
}

impl Http {
    /// One client for each reach and each set of roots. `extra_ca` is trusted everywhere.
    pub(super) fn new<'a>(
        guard: Guard,
        cas: impl Iterator<Item = Option<&'a Path>>,
        extra_ca: Option<&Path>,
    ) -> Result<Self, String> {
        let extra = extra_ca.map_or(Ok(Vec::new()), |ca| certificates("tls.ca", ca))?;
        let mut clients = HashMap::new();
        for ca in cas.chain([None]) {
            let roots = ca.map_or(Ok(Vec::new()), |ca| certificates("registry.ca", ca))?;
            for reach in [Reach::Anywhere, Reach::Public, Reach::Allowed] {
                for patience in [Patience::LastResort, Patience::OthersFollow] {
                    let key = ClientKey { reach, ca: ca.map(Path::to_owned), patience };
                    if clients.contains_key(&key) {
                        continue;
                    }
                    let client = Client::builder()
                        .user_agent(concat!("dray/", env!("CARGO_PKG_VERSION")))
                        // Same cost as HTTP/2 for a blob, without its windows, and sockets in parallel.
                        .http1_only()
                        .redirect(reqwest::redirect::Policy::none())
                        .connect_timeout(patience.connect_timeout())
                        .pool_idle_timeout(Duration::from_secs(60))
                        .pool_max_idle_per_host(16)
                        .dns_resolver(guard.resolver(reach))
                        .tls_certs_merge(extra.iter().chain(&roots).cloned())
                        .build()
                        .map_err(|e| {
                            format!("no HTTP client: {}; is the package ca-certificates installed?", error_chain(&e))
                        })?;
                    clients.insert(key, client);
                }
            }
        }
        Ok(Self { guard, clients })
    }

    /// Why an upstream that is only named by clients is refused, where its name tells.
    pub(super) fn refuses_literally(&self, upstream: &Upstream) -> Result<(), Refused> {
        Url::parse(&upstream.base()).map_or(Ok(()), |url| self.guard.refuses_literally(&url))
    }

    /// Sends a request and follows its redirects until an answer that is none. Returns the answer
    /// with the URL that gave it.
    pub(super) async fn follow(
        &self,
        home: Home<'_>,
        mut ask: Ask<'_>,
        deadline: Instant,
    ) -> Result<(Response, Url), SourceError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(home, &ask, deadline).await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, ask.url));
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let target = location
                .and_then(|location| ask.url.join(location).ok())
                .ok_or_else(|| SourceError::Malformed("a redirect without a usable Location".into()))?;
            if target.origin() != ask.url.origin() {
                // Signed URLs reject a second authorization, and nobody else may see ours.
                ask.authorization = None;
            }
            ask.url = target;
        }
        Err(SourceError::Malformed(format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// Sends a request without following anything.
    pub(super) async fn send(&self, home: Home<'_>, ask: &Ask<'_>, deadline: Instant) -> Result<Response, SourceError> {
        let at_home = ask.url.as_str().starts_with(&format!("{}/", home.upstream.base()));
        let reach = match home.trust {
            Trust::Written if at_home => Reach::Anywhere,
            _ => self.guard.check(&ask.url).await.map_err(|refused| SourceError::Guarded(refused.to_string()))?,
        };
        let key = ClientKey { reach, ca: home.ca.map(Path::to_owned), patience: home.patience };
        let client = self.clients.get(&key).ok_or_else(|| SourceError::Unreachable("no client".into()))?;
        let mut request = client.request(ask.method.clone(), ask.url.clone()).headers(ask.headers.clone());
        if let Some(authorization) = &ask.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        if let Some(form) = &ask.form {
            request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.clone());
        }
        let mut request = request.build().map_err(explain)?;
        let mut span = trace::begin("ask an origin", trace::Kind::Client);
        span.write(request.headers_mut());
        let answer = match timeout_at(deadline, client.execute(request)).await {
            Err(_) => Err(SourceError::TimedOut),
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(explain(error)),
        };
        tell(&mut span, ask, &answer);
        answer
    }
}

/// Never the path: it may be signed.
fn tell(span: &mut trace::Span, ask: &Ask<'_>, answer: &Result<Response, SourceError>) {
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

impl Patience {
    fn connect_timeout(self) -> Duration {
        match self {
            Self::LastResort => CONNECT_TIMEOUT,
            Self::OthersFollow => CONNECT_TIMEOUT_WITH_ALTERNATIVE,
        }
    }
}

/// Reads a PEM bundle that a key names.
fn certificates(key: &str, path: &Path) -> Result<Vec<Certificate>, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("{key} = \"{}\": {why}", path.display());
    let pem = std::fs::read(path).map_err(|error| wrong(&error))?;
    let found = Certificate::from_pem_bundle(&pem).map_err(|error| wrong(&error))?;
    if found.is_empty() { Err(wrong(&"holds no certificate in PEM")) } else { Ok(found) }
}

/// An error of the client library, without the URL: it may be signed.
fn explain(error: reqwest::Error) -> SourceError {
    let error = error.without_url();
    let text = error_chain(&error);
    // The resolver's refusal comes wrapped in layers of connection errors.
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(inner) = cause {
        if let Some(refused) = inner.downcast_ref::<Refused>() {
            return SourceError::Guarded(refused.to_string());
        }
        cause = inner.source();
    }
    if error.is_timeout() && !error.is_connect() {
        return SourceError::TimedOut;
    }
    SourceError::Unreachable(text)
}
