//! Client authentication: a challenge, a token endpoint, and tokens that come with each request (the distribution
//! specification's token authentication). The registry verifies the client's credential; dray never stores it.
//!
//! A request for content, if the rule authorizes clients at the registry:
//!
//! | credential shown | registry's response | result |
//! |---|---|---|
//! | none, or a token that is not valid for this repository | grants access to anyone | authorized, anonymous |
//! | none, or a token that is not valid for this repository | anything else | 401 with a challenge |
//! | token, or Basic | grants access | authorized |
//! | token, or Basic | 401, 403 | 403 |
//! | token, or Basic | 404 or another 4xx | the same status; 408 becomes 503 |
//! | token, or Basic | 429, 5xx or none, but granted access in the last hour | authorized |
//! | token, or Basic | 429, 5xx or none | 503 |
//! | Basic, while too many others are verified | not contacted | 503 |
//!
//! If the upstream denies or limits the content itself, an anonymous client gets the 401 as well.
//!
//! A request for a token:
//!
//! | credential shown | registry's response | result |
//! |---|---|---|
//! | none, or the rule needs none | not contacted | token for anonymous access |
//! | password or refresh token | token, or needs none | token, for 5 minutes at most |
//! | password or refresh token | 400, 401, 403, 404 | 401; if another scope was granted, a token without this scope |
//! | password or refresh token | 429, 5xx or none, but granted access in the last hour | token for 90 s, cache only |
//! | password or refresh token | 429, 5xx or none | 503 |
//! | malformed form | not contacted | 400 |

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use http::header::{AUTHORIZATION, HOST};
use http::{HeaderValue, Method, request::Parts};
use pingora::protocols::http::ServerSession as Session;
use tokio::time::timeout;

use super::client_policy::ClientPolicy;
use super::login_throttle::{LoginPermit, LoginThrottle};
use super::logins::Logins;
use super::{RegistryProxy, client_of};
use crate::config::{AccessConfig, Config};
use crate::key_file::KeyFile;
use crate::lifetimes::{ByLifetime, Lifetime};
use crate::oci::route;
use crate::oci::{Endpoint, Registry, Route};
use crate::principal::{Principal, PrincipalId, VerifiedPrincipal};
use crate::pull::{AuthorizationError, Authorizer, ExchangedSecret, PullError};
use crate::registries::{RepositoryRef, Rules};
use crate::respond::{PreparedResponse, PresentedToken};
use crate::secret::Secret;
use crate::single_flight::SingleFlight;
use crate::source::SourceError;
use crate::times::{ALTERNATIVE_TIMEOUT, AUTHORIZATION_TTL, DEFAULT_TTL, RETRY_INTERVAL, STALL_TIMEOUT};
use crate::token_issuer::{Right, TokenGrant, TokenIssuer};

/// Issues and verifies tokens.
pub struct ClientAuth {
    issuer: TokenIssuer,
    /// URL scheme of the registry listener.
    scheme: &'static str,
    listen: SocketAddr,
    /// What registries returned for credentials, never the credentials.
    checks: moka::sync::Cache<(PrincipalId, String), SecretCheck>,
    exchanges: SingleFlight<(PrincipalId, String), SecretCheck>,
    throttle: LoginThrottle,
}

/// The result of a credential's check at a registry.
#[derive(Clone)]
struct SecretCheck {
    principal: Result<Principal, SourceError>,
    checked_at: Instant,
    /// The latest expiry of a token that is issued for it.
    expires_at: Instant,
    /// How long this result is cached.
    ttl: Duration,
}

/// The path of the token endpoint.
pub(super) const TOKEN_PATH: &str = "/token";

/// The `service` of a challenge that is not for a certain registry.
const DEFAULT_SERVICE: &str = "dray";

/// Lifetime of a token that is issued while the registry fails. Larger: a revoked right lasts longer. Smaller: clients
/// request more tokens during an outage.
const OUTAGE_TOKEN_TTL: Duration = Duration::from_secs(90);

/// How long "this repository needs no token" is cached. Larger: a registry that starts to need one is noticed later.
const NO_TOKEN_NEEDED_TTL: Duration = Duration::from_secs(120);

/// Bounds all cached checks: most have one or two KiB, some 64. Smaller: more requests to the registries.
const MAX_CHECKS_BYTES: u64 = 16 * 1024 * 1024;

/// Repositories of one token: a client that copies requests two. Larger: the token may exceed a header's limit, since
/// each takes one or two KiB.
const MAX_SCOPES: usize = 4;

/// A longer token request is rejected, in bytes. Smaller: a long refresh token may not fit.
const MAX_FORM_BYTES: usize = 16 * 1024;

/// A parsed token request.
#[derive(Default)]
struct TokenRequest {
    service: Option<String>,
    scopes: Vec<String>,
    secret: Option<Secret>,
}

impl ClientAuth {
    pub fn new(config: &Config, scheme: &'static str, listen: SocketAddr) -> Result<Self, String> {
        let of_access =
            config.access.token_key_file.as_deref().map(|path| KeyFile { key: "access.token_key_file", path });
        // Peers that share a key also accept each other's tokens.
        let of_peers = config.peers.key_file.as_deref().map(|path| KeyFile { key: "peers.key_file", path });
        let issuer = TokenIssuer::new(of_access.or(of_peers))?;
        let checks = moka::sync::Cache::builder()
            .max_capacity(MAX_CHECKS_BYTES)
            .weigher(|(_, repository): &(PrincipalId, String), check: &SecretCheck| {
                check.bytes() + u32::try_from(repository.len()).unwrap_or(0)
            })
            .expire_after(ByLifetime)
            .build();
        Ok(Self { issuer, scheme, listen, checks, exchanges: SingleFlight::default(), throttle: LoginThrottle::new() })
    }

    /// Reads the users file again. Blocks on the disk.
    pub fn reload(&self, policy: &ClientPolicy) -> Result<(), String> {
        policy.logins.as_ref().map_or(Ok(()), |logins| logins.reload(&self.issuer))
    }

    /// The users of a configuration. Blocks on the disk.
    pub fn load_logins(&self, access: &AccessConfig) -> Result<Option<Arc<Logins>>, String> {
        access.users_file.as_deref().map(|path| Logins::load(path, &self.issuer).map(Arc::new)).transpose()
    }

    /// Whether a client has logged in, or need not.
    pub(super) fn is_logged_in(&self, logins: Option<&Logins>, request: &Parts) -> bool {
        let Some(logins) = logins else { return true };
        let credential = authorization(request).and_then(Secret::from_basic);
        credential.is_some_and(|secret| logins.contains(&secret, &self.issuer))
    }

    /// Requests authentication. For an expired token it says `invalid_token`: the client would send the token again.
    fn challenge(&self, request: &Parts, repository: Option<&RepositoryRef>) -> PreparedResponse {
        let host = host_of(request).filter(|host| host.parse::<Registry>().is_ok());
        let host = host.map_or_else(|| self.listen.to_string(), str::to_owned);
        let realm = format!("{}://{host}{TOKEN_PATH}", self.scheme);
        let token = if bearer(request).is_some() && self.grant(request).is_none() {
            PresentedToken::Invalid
        } else {
            PresentedToken::None
        };
        match repository {
            Some(repo_ref) => PreparedResponse::challenge(
                &realm,
                repo_ref.registry.as_str(),
                Some(repo_ref.repository.as_str()),
                token,
            ),
            None => PreparedResponse::challenge(&realm, DEFAULT_SERVICE, None, token),
        }
    }

    /// The principal of the request's token for this repository.
    fn principal_for(&self, request: &Parts, repo_ref: &RepositoryRef) -> Option<Principal> {
        let is_for = |right: &Right| {
            right.registry == repo_ref.registry
                && right.repository == repo_ref.repository
                && right.rule == repo_ref.rule.fingerprint()
        };
        self.grant(request)?.rights.into_iter().find(is_for).map(|right| right.principal)
    }

    /// The grant of the request's token. None: no token, an expired one, or one sealed with another key.
    fn grant(&self, request: &Parts) -> Option<TokenGrant> {
        self.issuer.open(bearer(request)?, SystemTime::now())
    }
}

impl RegistryProxy {
    /// `GET /v2/`: clients learn from it whether they must authenticate.
    pub(super) fn ping(&self, policy: &ClientPolicy, request: &Parts) -> PreparedResponse {
        let has_credential =
            self.client_auth.grant(request).is_some() || authorization(request).and_then(Secret::from_basic).is_some();
        if policy.rules.any_passthrough() && !has_credential {
            self.client_auth.challenge(request, None)
        } else {
            PreparedResponse::ping()
        }
    }

    /// Authorizes a client for a repository, with the rights that it has at the registry. A credential that was not
    /// accepted before holds a login permit until the registry has responded.
    pub(super) async fn authorize_client(
        &self,
        session: &Session,
        repo_ref: RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(RepositoryRef, Option<LoginPermit>), PreparedResponse> {
        let (request, from) = (session.req_header(), client_of(session));
        let presented = match self.presented_principal(request, from, &repo_ref).await {
            Ok(presented) => presented,
            Err(error) => return Err(PreparedResponse::refusal(&exchange_error(&error))),
        };
        let principal = presented.clone().unwrap_or(Principal::Anonymous);
        let repo_ref = RepositoryRef { principal, ..repo_ref };
        let permit = match repo_ref.principal.has_password() && !self.pull.authorizer.was_authorized(&repo_ref) {
            true => match self.client_auth.throttle.acquire(&repo_ref.registry, from).await {
                Ok(permit) => Some(permit),
                Err(error) => return Err(PreparedResponse::refusal(&exchange_error(&error))),
            },
            false => None,
        };
        match self.pull.authorizer.authorize(&repo_ref, endpoint, accept).await {
            // A list's own request is its authorization check, so the permit is held until then.
            Ok(()) => Ok((
                repo_ref,
                permit.filter(|_| matches!(endpoint, Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog)),
            )),
            // A registry may hide content from anonymous clients, and limit them first. If it fails, a client that was
            // authorized before can be recognized only by its credential.
            Err(_) if presented.is_none() => Err(self.client_auth.challenge(request, Some(&repo_ref))),
            Err(AuthorizationError::Denied) => {
                permit.into_iter().for_each(LoginPermit::mark_rejected);
                Err(PreparedResponse::refusal(&access_denied()))
            }
            Err(AuthorizationError::Refused(refusal)) => Err(PreparedResponse::refusal(&refusal)),
        }
    }

    /// The response to an upstream's error. An authorized anonymous client gets a challenge: a registry may confirm to
    /// anonymous clients that content exists, but serve it, or enough of it, to authenticated ones only.
    pub(super) fn client_error(
        &self,
        request: &Parts,
        repo_ref: &RepositoryRef,
        refusal: &PullError,
    ) -> PreparedResponse {
        let has_credential = self.client_auth.principal_for(request, repo_ref).is_some()
            || authorization(request).and_then(Secret::from_basic).is_some();
        match refusal {
            PullError::Limited(_) if repo_ref.principal == Principal::Anonymous && !has_credential => {
                self.client_auth.challenge(request, Some(repo_ref))
            }
            refusal if refusal.is_denied() && repo_ref.principal == Principal::Anonymous && !has_credential => {
                self.client_auth.challenge(request, Some(repo_ref))
            }
            refusal => PreparedResponse::refusal(refusal),
        }
    }

    /// The principal of the request's credential. None: it has no valid one for this repository.
    async fn presented_principal(
        &self,
        request: &Parts,
        from: Option<IpAddr>,
        repo_ref: &RepositoryRef,
    ) -> Result<Option<Principal>, SourceError> {
        if let Some(secret) = authorization(request).and_then(Secret::from_basic) {
            return self.exchange(repo_ref, secret, from, Duration::ZERO).await.principal.map(Some);
        }
        Ok(self.client_auth.principal_for(request, repo_ref))
    }

    /// Exchanges a credential at the registry; concurrent requests with the same credential share one exchange. A
    /// cached check is used if it failed, or is valid for `min_remaining`. The registry's token is cached, a password
    /// never.
    async fn exchange(
        &self,
        repo_ref: &RepositoryRef,
        secret: Secret,
        from: Option<IpAddr>,
        min_remaining: Duration,
    ) -> SecretCheck {
        let principal_id = self.client_auth.issuer.principal_id(&secret);
        let key = (principal_id, repo_ref.rule_key());
        let cached = self.client_auth.checks.get(&key);
        if let Some(check) = &cached
            && (check.principal.is_err() || check.remaining() >= min_remaining)
        {
            return check.clone();
        }
        let exchanging = self.client_auth.exchanges.join(key.clone(), || {
            let (authorizer, client_auth, repo_ref) =
                (self.pull.authorizer.clone(), self.client_auth.clone(), repo_ref.clone());
            async move {
                let basic = secret.basic();
                let known = Principal::Verified(Arc::new(VerifiedPrincipal { id: principal_id, authorization: None }));
                let permit = match authorizer.was_authorized(&RepositoryRef { principal: known, ..repo_ref.clone() }) {
                    true => Ok(None),
                    false => client_auth.throttle.acquire(&repo_ref.registry, from).await.map(Some),
                };
                let exchanged = match permit {
                    Ok(permit) => {
                        let exchanged = authorizer.exchange(&repo_ref, secret).await;
                        if let (Some(permit), Err(SourceError::Denied(_))) = (permit, &exchanged) {
                            permit.mark_rejected();
                        }
                        exchanged
                    }
                    Err(busy) => Err(busy),
                };
                let check = SecretCheck::of(exchanged, principal_id, &repo_ref, &authorizer);
                let is_secret = |holder: &VerifiedPrincipal| {
                    let presented = holder.authorization.as_ref().map(|value| value.as_bytes());
                    presented.is_some() && presented == basic.as_deref().map(str::as_bytes)
                };
                if !check.principal.as_ref().is_ok_and(|principal| principal.holder().is_some_and(is_secret)) {
                    client_auth.checks.insert(key, check.clone());
                }
                check
            }
        });
        let ended =
            || SecretCheck::new(Err(SourceError::Unreachable("the exchange was aborted".into())), Duration::ZERO);
        match cached {
            None => exchanging.await.unwrap_or_else(ended),
            // The cached check, valid for less, serves if the registry fails or is slow.
            Some(cached) => match timeout(ALTERNATIVE_TIMEOUT, exchanging).await {
                Ok(Some(new)) if !new.is_transient() => new,
                _ => cached,
            },
        }
    }

    /// The token endpoint.
    pub(super) async fn issue_token(&self, policy: &ClientPolicy, session: &mut Session) -> PreparedResponse {
        let request = match timeout(STALL_TIMEOUT, read_token_request(session))
            .await
            .unwrap_or(Err("the token request timed out"))
        {
            Ok(request) => request,
            Err(problem) => return PreparedResponse::malformed_token_request(problem),
        };
        let host = host_of(session.req_header());
        let repositories = request
            .scopes
            .iter()
            .filter_map(|scope| repository_of_scope(&policy.rules, scope, request.service.as_deref(), host));
        let mut grant = TokenGrant { rights: Vec::new(), life: AUTHORIZATION_TTL };
        for repo_ref in repositories.take(MAX_SCOPES) {
            let mut principal = Principal::Anonymous;
            if let Some(secret) = request.secret.clone().filter(|_| repo_ref.rule.is_passthrough()) {
                let check = self.exchange(&repo_ref, secret, client_of(session), DEFAULT_TTL).await;
                let life = if check.is_new() { check.remaining().max(DEFAULT_TTL) } else { check.remaining() };
                principal = match check.principal {
                    Ok(principal) => principal,
                    // The token is useful for the scopes that were granted.
                    Err(_) if grant.rights.iter().any(|right| right.principal.holder().is_some()) => continue,
                    Err(SourceError::Denied(_)) => {
                        return PreparedResponse::credential_rejected("the registry rejected these credentials");
                    }
                    Err(error) => return PreparedResponse::refusal(&exchange_error(&error)),
                };
                grant.life = grant.life.min(life);
            }
            let rule = repo_ref.rule.fingerprint().to_owned();
            grant.rights.push(Right { registry: repo_ref.registry, repository: repo_ref.repository, rule, principal });
        }
        // If the registries' own tokens are too long together, the last repositories are left out.
        let sealed = loop {
            match self.client_auth.issuer.seal(&grant, SystemTime::now()) {
                None if grant.rights.len() > 1 => grant.rights.pop(),
                sealed => break sealed,
            };
        };
        match sealed {
            Some(token) => PreparedResponse::token(&token, grant.life.as_secs().max(1)),
            None => PreparedResponse::refusal(&PullError::InvalidUpstreamResponse(
                "the registry's token is too long to be passed on".into(),
            )),
        }
    }
}

/// The repository of a scope `repository:<name>:<actions>`, resolved as in a path.
fn repository_of_scope(rules: &Rules, scope: &str, service: Option<&str>, host: Option<&str>) -> Option<RepositoryRef> {
    let (name, _) = scope.strip_prefix("repository:")?.rsplit_once(':')?;
    let namespace = service.filter(|service| *service != DEFAULT_SERVICE);
    let query = namespace.map(|ns| url::form_urlencoded::Serializer::new(String::new()).append_pair("ns", ns).finish());
    match route::parse(&format!("/v2/{name}/tags/list"), query.as_deref(), host, rules).ok()? {
        Route::Content { registry, repository, .. } => Some(rules.repo_ref(registry, repository)),
        Route::Ping => None,
    }
}

fn access_denied() -> PullError {
    PullError::Denied("the registry denies access with these credentials".into())
}

fn exchange_error(error: &SourceError) -> PullError {
    match error {
        SourceError::Denied(_) => access_denied(),
        error => PullError::Unavailable(format!("cannot authorize the request at the registry: {error}")),
    }
}

fn authorization(request: &Parts) -> Option<&str> {
    request.headers.get(AUTHORIZATION)?.to_str().ok()
}

fn bearer(request: &Parts) -> Option<&str> {
    let (scheme, token) = authorization(request)?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn host_of(request: &Parts) -> Option<&str> {
    let header = request.headers.get(HOST).and_then(|value| value.to_str().ok());
    header.or_else(|| request.uri.authority().map(|authority| authority.as_str()))
}

/// Reads a token request: GET with Basic, or POST with a form (OAuth2).
async fn read_token_request(session: &mut Session) -> Result<TokenRequest, &'static str> {
    let request = session.req_header();
    if request.method == Method::GET {
        let mut token_request = TokenRequest::of_form(request.uri.query().unwrap_or_default().as_bytes());
        token_request.secret = authorization(request).and_then(Secret::from_basic);
        return Ok(token_request);
    }
    let mut form = BytesMut::new();
    while let Some(piece) = session.read_request_body().await.map_err(|_| "the token request is incomplete")? {
        if form.len() + piece.len() > MAX_FORM_BYTES {
            return Err("the token request exceeds 16 KiB");
        }
        form.extend_from_slice(&piece);
    }
    Ok(TokenRequest::of_form(&form))
}

impl TokenRequest {
    fn of_form(form: &[u8]) -> Self {
        let mut token_request = Self::default();
        let (mut username, mut password, mut refresh_token) = (None, None, None);
        for (key, value) in url::form_urlencoded::parse(form) {
            match &*key {
                "service" => token_request.service = Some(value.into_owned()).filter(|service| !service.is_empty()),
                "scope" => token_request.scopes.extend(value.split_whitespace().map(str::to_owned)),
                "username" => username = Some(value.into_owned()),
                "password" => password = Some(value.into_owned()),
                "refresh_token" => refresh_token = Some(value.into_owned()),
                _ => {}
            }
        }
        token_request.secret = match (username, password, refresh_token) {
            (Some(username), Some(password), _) => Some(Secret::Password { username, password }),
            (_, _, Some(token)) => Some(Secret::Identity(token)),
            _ => None,
        };
        token_request
    }
}

impl SecretCheck {
    fn new(principal: Result<Principal, SourceError>, ttl: Duration) -> Self {
        let now = Instant::now();
        Self { principal, checked_at: now, expires_at: now + ttl, ttl }
    }

    /// Whether the registry has just responded: what it grants is valid for a minute at least.
    fn is_new(&self) -> bool {
        self.checked_at.elapsed() < ALTERNATIVE_TIMEOUT
    }

    /// Whether the check failed for a reason that may pass.
    fn is_transient(&self) -> bool {
        self.principal.as_ref().is_err_and(SourceError::is_transient_outage)
    }

    fn remaining(&self) -> Duration {
        self.expires_at.saturating_duration_since(Instant::now())
    }

    fn bytes(&self) -> u32 {
        let authorization = self.principal.as_ref().ok().and_then(Principal::authorization).map_or(0, HeaderValue::len);
        u32::try_from(size_of::<Self>() + authorization).unwrap_or(u32::MAX)
    }

    fn of(
        exchanged: Result<ExchangedSecret, SourceError>,
        principal_id: PrincipalId,
        repo_ref: &RepositoryRef,
        authorizer: &Authorizer,
    ) -> Self {
        let holder =
            |authorization| Principal::Verified(Arc::new(VerifiedPrincipal { id: principal_id, authorization }));
        match exchanged {
            Ok(ExchangedSecret { authorization: None, .. }) => Self::new(Ok(Principal::Anonymous), NO_TOKEN_NEEDED_TTL),
            Ok(ExchangedSecret { authorization, life }) => {
                Self::new(Ok(holder(authorization)), life.min(AUTHORIZATION_TTL))
            }
            Err(SourceError::Denied(_)) => {
                authorizer.revoke_authorization(&RepositoryRef { principal: holder(None), ..repo_ref.clone() });
                Self::new(Err(SourceError::denied()), repo_ref.rule.negative_ttl)
            }
            Err(error) => {
                let known = RepositoryRef { principal: holder(None), ..repo_ref.clone() };
                // `Busy` is this node's own limit, not an outage of the registry.
                let was_authorized =
                    error != SourceError::Busy && error.is_transient_outage() && authorizer.was_authorized(&known);
                let check = Self::new(if was_authorized { Ok(known.principal) } else { Err(error) }, OUTAGE_TOKEN_TTL);
                Self { ttl: RETRY_INTERVAL, ..check }
            }
        }
    }
}

impl Lifetime for SecretCheck {
    fn life(&self) -> Duration {
        self.ttl
    }
}
