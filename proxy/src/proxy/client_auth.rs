//! Who may have what, as a client sees it: a challenge, a token endpoint, and tokens that are shown with each request
//! (the distribution specification's token authentication). The secret that a client sends is held against the
//! registry's own word, and not kept.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use http::header::{AUTHORIZATION, HOST};
use http::{HeaderValue, Method, request::Parts};
use pingora::protocols::http::ServerSession as Session;
use tokio::time::timeout;

use super::login_throttle::{LoginPermit, LoginThrottle};
use super::logins::Logins;
use super::{RegistryProxy, client_of};
use crate::config::Config;
use crate::key_file::KeyFile;
use crate::lifetimes::{ByLifetime, Lifetime};
use crate::oci::route;
use crate::oci::{Endpoint, Registry, Route};
use crate::principal::{Principal, PrincipalId, VerifiedPrincipal};
use crate::pull::{AuthorizationError, ExchangedSecret, Pull, PullError};
use crate::registries::RepositoryRef;
use crate::respond::{PreparedResponse, PresentedToken};
use crate::secret::Secret;
use crate::single_flight::SingleFlight;
use crate::source::SourceError;
use crate::times::{ALTERNATIVE_TIMEOUT, DEFAULT_TTL, RETRY_INTERVAL, RIGHTS_TTL, STALL_TIMEOUT};
use crate::token_issuer::{Right, TokenGrant, TokenIssuer};

/// Makes and reads tokens.
pub struct ClientAuth {
    grants: TokenIssuer,
    /// By which the registry listener is reached.
    scheme: &'static str,
    listen: SocketAddr,
    /// None: whoever can connect may use this process.
    logins: Option<Logins>,
    /// What registries gave for secrets, never the secrets.
    shown: moka::sync::Cache<(PrincipalId, String), SecretCheck>,
    exchanges: SingleFlight<(PrincipalId, String), SecretCheck>,
    turns: LoginThrottle,
}

/// What came of a secret at a registry.
#[derive(Clone)]
struct SecretCheck {
    caller: Result<Principal, SourceError>,
    since: Instant,
    /// For how long a token may say so.
    until: Instant,
    /// For how long it is remembered here.
    life: Duration,
}

/// The path of the token endpoint.
pub(super) const TOKEN: &str = "/token";

/// By this name dray is the service, before a client has said which registry it wants.
const SERVICE: &str = "dray";

/// While the registry is in trouble, a token is good for so long, and it is not asked again for a moment.
const IN_TROUBLE: Duration = Duration::from_secs(90);

/// Those of whom a registry wants to know nothing are asked about again after this time.
const ASKS_NOBODY: Duration = Duration::from_secs(120);

/// All of them together: most have one or two KiB, some 64.
const MAX_SHOWN_BYTES: u64 = 16 * 1024 * 1024;

/// Repositories that one token is for: a client that copies asks for two. Each takes a KiB or two of the token.
const MOST_SCOPES: usize = 4;

/// Larger than any form of a client, in bytes, and longer than any takes to come.
const MAX_FORM: usize = 16 * 1024;

/// What a client asks a token for.
#[derive(Default)]
struct TokenRequest {
    service: Option<String>,
    scopes: Vec<String>,
    secret: Option<Secret>,
}

impl ClientAuth {
    pub fn new(config: &Config, scheme: &'static str, listen: SocketAddr) -> Result<Self, String> {
        let of_access = config.access.key_file.as_deref().map(|path| KeyFile { key: "access.key_file", path });
        // Those who believe each other take each other's tokens as well.
        let of_peers = config.peers.key_file.as_deref().map(|path| KeyFile { key: "peers.key_file", path });
        let grants = TokenIssuer::new(of_access.or(of_peers))?;
        let logins = config.access.logins_file.as_deref().map(|path| Logins::load(path, &grants)).transpose()?;
        let shown = moka::sync::Cache::builder()
            .max_capacity(MAX_SHOWN_BYTES)
            .weigher(|(_, place): &(PrincipalId, String), shown: &SecretCheck| {
                shown.bytes() + u32::try_from(place.len()).unwrap_or(0)
            })
            .expire_after(ByLifetime)
            .build();
        Ok(Self {
            grants,
            scheme,
            listen,
            logins,
            shown,
            exchanges: SingleFlight::default(),
            turns: LoginThrottle::new(),
        })
    }

    /// Reads the logins again. Blocks on the disk.
    pub fn reload(&self) -> Result<(), String> {
        self.logins.as_ref().map_or(Ok(()), |logins| logins.reload(&self.grants))
    }

    /// Whether a client has logged in, or need not.
    pub(super) fn knows(&self, request: &Parts) -> bool {
        let Some(logins) = &self.logins else { return true };
        let shown = authorization(request).and_then(Secret::from_basic);
        shown.is_some_and(|secret| logins.know(&secret, &self.grants))
    }

    /// Asks a client who it is. One that shows a token which is too old has to hear that it is: it would show it again.
    fn challenge(&self, request: &Parts, wanted: Option<&RepositoryRef>) -> PreparedResponse {
        let host = host_of(request).filter(|host| host.parse::<Registry>().is_ok());
        let host = host.map_or_else(|| self.listen.to_string(), str::to_owned);
        let realm = format!("{}://{host}{TOKEN}", self.scheme);
        let shown = if bearer(request).is_some() && self.grant(request).is_none() {
            PresentedToken::Invalid
        } else {
            PresentedToken::None
        };
        match wanted {
            Some(place) => {
                PreparedResponse::challenge(&realm, place.registry.as_str(), Some(place.repository.as_str()), shown)
            }
            None => PreparedResponse::challenge(&realm, SERVICE, None, shown),
        }
    }

    /// With whose rights a request comes to this place.
    fn grant_for(&self, request: &Parts, place: &RepositoryRef) -> Option<Principal> {
        let is_for = |right: &Right| right.registry == place.registry && right.repository == place.repository;
        self.grant(request)?.rights.into_iter().find(is_for).map(|right| right.caller)
    }

    /// What a request shows. None: nothing that this process has given.
    fn grant(&self, request: &Parts) -> Option<TokenGrant> {
        self.grants.open(bearer(request)?, SystemTime::now())
    }
}

impl RegistryProxy {
    /// `GET /v2/`, by which clients find out whether they are to say who they are.
    pub(super) fn ping(&self, request: &Parts) -> PreparedResponse {
        let knows = self.gate.grant(request).is_some() || authorization(request).and_then(Secret::from_basic).is_some();
        if self.registries.ask_who() && !knows { self.gate.challenge(request, None) } else { PreparedResponse::ping() }
    }

    /// Lets a client into a place, with the rights that it has at the registry, or says why not. What may still be a guess
    /// has a turn until it is known.
    pub(super) async fn let_in(
        &self,
        session: &Session,
        place: RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(RepositoryRef, Option<LoginPermit>), PreparedResponse> {
        let (request, from) = (session.req_header(), client_of(session));
        let shown = match self.presented(request, from, &place).await {
            Ok(shown) => shown,
            Err(error) => return Err(PreparedResponse::refusal(&not_exchanged(&error))),
        };
        let caller = shown.clone().unwrap_or(Principal::Anonymous);
        let place = RepositoryRef { caller, ..place };
        let turn = match place.caller.shows_secret() && !self.pull.was_let_in(&place) {
            true => match self.gate.turns.take(&place.registry, from).await {
                Ok(turn) => Some(turn),
                Err(error) => return Err(PreparedResponse::refusal(&not_exchanged(&error))),
            },
            false => None,
        };
        match self.pull.let_in(&place, endpoint, accept).await {
            // What is a list's alone is found out by asking for it.
            Ok(()) => Ok((
                place,
                turn.filter(|_| matches!(endpoint, Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog)),
            )),
            // A registry may hide from strangers what it has, and limit them before others. And while it is in trouble
            // those who were let in lately have to say who they are.
            Err(_) if shown.is_none() => Err(self.gate.challenge(request, Some(&place))),
            Err(AuthorizationError::Denied) => {
                turn.into_iter().for_each(LoginPermit::was_wrong);
                Err(PreparedResponse::refusal(&denied()))
            }
            Err(AuthorizationError::Refused(refusal)) => Err(PreparedResponse::refusal(&refusal)),
        }
    }

    /// What to say of the registry's own refusal to somebody who was let in without having shown anything. It may have
    /// told strangers that it has something, and give it, or enough of it, only to those whom it knows.
    pub(super) fn refuse(&self, request: &Parts, place: &RepositoryRef, refusal: &PullError) -> PreparedResponse {
        let has_shown = self.gate.grant_for(request, place).is_some()
            || authorization(request).and_then(Secret::from_basic).is_some();
        match refusal {
            PullError::Limited(_) if place.caller == Principal::Anonymous && !has_shown => {
                self.gate.challenge(request, Some(place))
            }
            refusal if refusal.is_denied() && place.caller == Principal::Anonymous && !has_shown => {
                self.gate.challenge(request, Some(place))
            }
            refusal => PreparedResponse::refusal(refusal),
        }
    }

    /// Whose rights a request shows. None: none.
    async fn presented(
        &self,
        request: &Parts,
        from: Option<IpAddr>,
        place: &RepositoryRef,
    ) -> Result<Option<Principal>, SourceError> {
        if let Some(secret) = authorization(request).and_then(Secret::from_basic) {
            return self.exchange(place, secret, from, Duration::ZERO).await.caller.map(Some);
        }
        Ok(self.gate.grant_for(request, place))
    }

    /// What a secret opens at a place's registry, for as long as possible where it is not known to be good for `least`:
    /// asked for once for all who show it at the same time. A registry's token is kept as long as it is good, a secret
    /// never.
    async fn exchange(
        &self,
        place: &RepositoryRef,
        secret: Secret,
        from: Option<IpAddr>,
        least: Duration,
    ) -> SecretCheck {
        let who = self.gate.grants.who(&secret);
        let key = (who, place.to_string());
        let known = self.gate.shown.get(&key);
        if let Some(shown) = &known
            && (shown.caller.is_err() || shown.left() >= least)
        {
            return shown.clone();
        }
        let landed = self.gate.exchanges.join(key.clone(), || {
            let (pull, gate, place) = (self.pull.clone(), self.gate.clone(), place.clone());
            async move {
                let itself = secret.basic();
                let known = Principal::Holder(Arc::new(VerifiedPrincipal { who, authorization: None }));
                let turn = match pull.was_let_in(&RepositoryRef { caller: known, ..place.clone() }) {
                    true => Ok(None),
                    false => gate.turns.take(&place.registry, from).await.map(Some),
                };
                let exchanged = match turn {
                    Ok(turn) => {
                        let exchanged = pull.exchange(&place, secret).await;
                        if let (Some(turn), Err(SourceError::Denied(_))) = (turn, &exchanged) {
                            turn.was_wrong();
                        }
                        exchanged
                    }
                    Err(busy) => Err(busy),
                };
                let shown = SecretCheck::of(exchanged, who, &place, &pull);
                let is_secret = |holder: &VerifiedPrincipal| {
                    let shown = holder.authorization.as_ref().map(|value| value.as_bytes());
                    shown.is_some() && shown == itself.as_deref().map(str::as_bytes)
                };
                if !shown.caller.as_ref().is_ok_and(|caller| caller.holder().is_some_and(is_secret)) {
                    gate.shown.insert(key, shown.clone());
                }
                shown
            }
        });
        let ended = || SecretCheck::new(Err(SourceError::Unreachable("the exchange ended".into())), Duration::ZERO);
        match known {
            None => landed.await.unwrap_or_else(ended),
            // It is good for a while, and better than nothing while the registry is in trouble.
            Some(known) => match timeout(ALTERNATIVE_TIMEOUT, landed).await {
                Ok(Some(new)) if !new.is_passing() => new,
                _ => known,
            },
        }
    }

    /// The token endpoint.
    pub(super) async fn give_token(&self, session: &mut Session) -> PreparedResponse {
        let wanted = match timeout(STALL_TIMEOUT, wanted(session)).await.unwrap_or(Err("the form does not come")) {
            Ok(wanted) => wanted,
            Err(problem) => return PreparedResponse::no_token(problem),
        };
        let host = host_of(session.req_header());
        let places = wanted.scopes.iter().filter_map(|scope| self.place_of(scope, wanted.service.as_deref(), host));
        let mut grant = TokenGrant { rights: Vec::new(), life: RIGHTS_TTL };
        for place in places.take(MOST_SCOPES) {
            let mut caller = Principal::Anonymous;
            if let Some(secret) = wanted.secret.clone().filter(|_| place.rule.asks_who()) {
                let shown = self.exchange(&place, secret, client_of(session), DEFAULT_TTL).await;
                let life = if shown.is_new() { shown.left().max(DEFAULT_TTL) } else { shown.left() };
                caller = match shown.caller {
                    Ok(caller) => caller,
                    // What this secret opens elsewhere is of use without this.
                    Err(_) if grant.rights.iter().any(|right| right.caller.holder().is_some()) => continue,
                    Err(SourceError::Denied(_)) => {
                        return PreparedResponse::wrong_secret("the registry does not take this secret");
                    }
                    Err(error) => return PreparedResponse::refusal(&not_exchanged(&error)),
                };
                grant.life = grant.life.min(life);
            }
            grant.rights.push(Right { registry: place.registry, repository: place.repository, caller });
        }
        // Registries' own tokens may be long: then it is for the first repositories only.
        let sealed = loop {
            match self.gate.grants.seal(&grant, SystemTime::now()) {
                None if grant.rights.len() > 1 => grant.rights.pop(),
                sealed => break sealed,
            };
        };
        match sealed {
            Some(token) => PreparedResponse::token(&token, grant.life.as_secs().max(1)),
            None => PreparedResponse::refusal(&PullError::BadOrigin("the registry's token is too long".into())),
        }
    }

    /// The place that `repository:<name>:<actions>` means, by the rules of paths.
    fn place_of(&self, scope: &str, service: Option<&str>, host: Option<&str>) -> Option<RepositoryRef> {
        let (name, _) = scope.strip_prefix("repository:")?.rsplit_once(':')?;
        let namespace = service.filter(|service| *service != SERVICE);
        let query =
            namespace.map(|ns| url::form_urlencoded::Serializer::new(String::new()).append_pair("ns", ns).finish());
        match route::parse(&format!("/v2/{name}/tags/list"), query.as_deref(), host, &*self.registries).ok()? {
            Route::Content { registry, repository, .. } => Some(self.pull.place(registry, repository)),
            Route::Ping => None,
        }
    }
}

fn denied() -> PullError {
    PullError::Denied("the registry does not give it to whoever has these rights".into())
}

fn not_exchanged(error: &SourceError) -> PullError {
    match error {
        SourceError::Denied(_) => denied(),
        error => PullError::Unavailable(format!("whether this may be given cannot be found out now: {error}")),
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

/// Reads a question for a token: by GET with Basic, or by POST as OAuth2 has it.
async fn wanted(session: &mut Session) -> Result<TokenRequest, &'static str> {
    let request = session.req_header();
    if request.method == Method::GET {
        let mut wanted = TokenRequest::of_form(request.uri.query().unwrap_or_default().as_bytes());
        wanted.secret = authorization(request).and_then(Secret::from_basic);
        return Ok(wanted);
    }
    let mut form = BytesMut::new();
    while let Some(piece) = session.read_request_body().await.map_err(|_| "the form ended early")? {
        if form.len() + piece.len() > MAX_FORM {
            return Err("the form is too long");
        }
        form.extend_from_slice(&piece);
    }
    Ok(TokenRequest::of_form(&form))
}

impl TokenRequest {
    fn of_form(form: &[u8]) -> Self {
        let mut wanted = Self::default();
        let (mut username, mut password, mut refresh_token) = (None, None, None);
        for (key, value) in url::form_urlencoded::parse(form) {
            match &*key {
                "service" => wanted.service = Some(value.into_owned()).filter(|service| !service.is_empty()),
                "scope" => wanted.scopes.extend(value.split_whitespace().map(str::to_owned)),
                "username" => username = Some(value.into_owned()),
                "password" => password = Some(value.into_owned()),
                "refresh_token" => refresh_token = Some(value.into_owned()),
                _ => {}
            }
        }
        wanted.secret = match (username, password, refresh_token) {
            (Some(username), Some(password), _) => Some(Secret::Password { username, password }),
            (_, _, Some(token)) => Some(Secret::Identity(token)),
            _ => None,
        };
        wanted
    }
}

impl SecretCheck {
    fn new(caller: Result<Principal, SourceError>, life: Duration) -> Self {
        let now = Instant::now();
        Self { caller, since: now, until: now + life, life }
    }

    /// Whether the registry has just said so: what it grants is good for a minute at least.
    fn is_new(&self) -> bool {
        self.since.elapsed() < ALTERNATIVE_TIMEOUT
    }

    /// Whether nothing came of it, and something may another time.
    fn is_passing(&self) -> bool {
        self.caller.as_ref().is_err_and(SourceError::is_passing_outage)
    }

    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    fn bytes(&self) -> u32 {
        let authorization = self.caller.as_ref().ok().and_then(Principal::authorization).map_or(0, HeaderValue::len);
        u32::try_from(size_of::<Self>() + authorization).unwrap_or(u32::MAX)
    }

    fn of(
        exchanged: Result<ExchangedSecret, SourceError>,
        who: PrincipalId,
        place: &RepositoryRef,
        pull: &Pull,
    ) -> Self {
        let holder = |authorization| Principal::Holder(Arc::new(VerifiedPrincipal { who, authorization }));
        match exchanged {
            Ok(ExchangedSecret { authorization: None, .. }) => Self::new(Ok(Principal::Anonymous), ASKS_NOBODY),
            Ok(ExchangedSecret { authorization, life }) => Self::new(Ok(holder(authorization)), life.min(RIGHTS_TTL)),
            Err(SourceError::Denied(_)) => {
                pull.shut_out(&RepositoryRef { caller: holder(None), ..place.clone() });
                Self::new(Err(SourceError::denied()), place.rule.negative_ttl)
            }
            Err(error) => {
                let known = RepositoryRef { caller: holder(None), ..place.clone() };
                // That too many ask here is no trouble of the registry's.
                let still = error != SourceError::Busy && error.is_passing_outage() && pull.was_let_in(&known);
                let shown = Self::new(if still { Ok(known.caller) } else { Err(error) }, IN_TROUBLE);
                Self { life: RETRY_INTERVAL, ..shown }
            }
        }
    }
}

impl Lifetime for SecretCheck {
    fn life(&self) -> Duration {
        self.life
    }
}
