//! Issues the tokens that clients get for their credentials. A token states for some minutes what the client may pull;
//! the client sends it with each request.
//!
//! A token is sealed: clients can neither forge it nor read the upstream's `Authorization` in it. So dray stores no
//! credentials, and processes with the same key accept each other's tokens.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderValue;
use ring::hmac::{self, HMAC_SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::key_file::KeyFile;
use crate::oci::{Registry, Repository};
use crate::principal::{Principal, PrincipalId, VerifiedPrincipal};
use crate::sealing::Sealing;
use crate::secret::Secret;

/// Seals and opens tokens, and computes principal IDs.
pub struct TokenIssuer {
    sealing: Sealing,
    id_key: hmac::Key,
}

/// The content of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenGrant {
    /// Empty: a login that requested no repository yet.
    pub rights: Vec<Right>,
    pub life: Duration,
}

/// With whose rights a client may pull from a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Right {
    pub registry: Registry,
    pub repository: Repository,
    /// Fingerprint of the rule: another rule may have other upstreams, which must not get this principal's credential.
    pub rule: String,
    pub principal: Principal,
}

/// The sealed content. An incompatible change needs another [`SEAL_CONTEXT`].
#[derive(Serialize, Deserialize)]
struct Sealed {
    expires: u64,
    rights: Vec<SealedRight>,
}

#[derive(Serialize, Deserialize)]
struct SealedRight {
    registry: String,
    repository: String,
    rule: String,
    principal_id: Option<[u8; 16]>,
    authorization: Option<String>,
}

const SEAL_CONTEXT: &[u8] = b"dray grant 3";

/// Longest token that is issued or opened, in characters. Longer: clients send longer headers than servers accept.
/// Shorter: registries with long tokens are unusable.
const MAX_TOKEN_CHARS: usize = 32 * 1024;

impl TokenIssuer {
    /// With the keys of a file, shared by all processes whose file has the same first line, or random ones.
    pub fn new(key_file: Option<KeyFile<'_>>) -> Result<Self, String> {
        let secret = match key_file {
            Some(file) => file.lines()?.swap_remove(0).into_bytes(),
            None => {
                let mut bytes = vec![0; 32];
                SystemRandom::new()
                    .fill(&mut bytes)
                    .map_err(|_| "cannot read random bytes from the operating system".to_owned())?;
                bytes
            }
        };
        let sealing =
            Sealing::new(&secret, SEAL_CONTEXT).ok_or_else(|| "cannot derive the key of client tokens".to_owned())?;
        let id_key = hmac::Key::new(HMAC_SHA256, &[b"dray principal 1", &secret[..]].concat());
        Ok(Self { sealing, id_key })
    }

    /// The principal ID of a credential.
    pub fn principal_id(&self, secret: &Secret) -> PrincipalId {
        let text = match secret {
            Secret::Password { username, password } => format!("password\0{}\0{username}{password}", username.len()),
            Secret::Identity(token) => format!("identity\0{token}"),
            Secret::Bearer(token) => format!("bearer\0{token}"),
        };
        let mut id = [0; 16];
        id.copy_from_slice(&hmac::sign(&self.id_key, text.as_bytes()).as_ref()[..16]);
        PrincipalId(id)
    }

    /// None: the token would be too long, because it contains the upstream's own token.
    pub fn seal(&self, grant: &TokenGrant, now: SystemTime) -> Option<String> {
        let sealed = Sealed {
            // Rounded up: the token must not expire before the time that the client was given.
            expires: (now + grant.life + Duration::from_millis(999)).duration_since(UNIX_EPOCH).ok()?.as_secs(),
            rights: grant.rights.iter().map(Right::to_seal).collect::<Option<_>>()?,
        };
        let token = self.sealing.seal(&serde_json::to_vec(&sealed).ok()?)?;
        (token.len() <= MAX_TOKEN_CHARS).then_some(token)
    }

    /// Opens a token. None: it was sealed with another key, or is expired.
    pub fn open(&self, token: &str, now: SystemTime) -> Option<TokenGrant> {
        let plain = (token.len() <= MAX_TOKEN_CHARS).then(|| self.sealing.open(token.as_bytes()))??;
        let sealed: Sealed = serde_json::from_slice(&plain).ok()?;
        let life = (UNIX_EPOCH + Duration::from_secs(sealed.expires)).duration_since(now).ok()?;
        let rights = sealed.rights.into_iter().map(Right::opened).collect::<Option<_>>()?;
        Some(TokenGrant { rights, life })
    }
}

impl Right {
    fn to_seal(&self) -> Option<SealedRight> {
        let authorization = self.principal.authorization();
        Some(SealedRight {
            registry: self.registry.to_string(),
            repository: self.repository.to_string(),
            rule: self.rule.clone(),
            principal_id: self.principal.holder().map(|holder| holder.id.0),
            authorization: authorization.map(|value| value.to_str().map(str::to_owned)).transpose().ok()?,
        })
    }

    fn opened(sealed: SealedRight) -> Option<Self> {
        let authorization = sealed.authorization.and_then(|text| sensitive(&text));
        let principal = match sealed.principal_id {
            Some(id) => Principal::Verified(Arc::new(VerifiedPrincipal { id: PrincipalId(id), authorization })),
            None => Principal::Anonymous,
        };
        let (registry, repository) = (sealed.registry.parse().ok()?, sealed.repository.parse().ok()?);
        Some(Self { registry, repository, rule: sealed.rule, principal })
    }
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> TokenGrant {
        let holder = VerifiedPrincipal { id: PrincipalId([7; 16]), authorization: sensitive("Bearer hush") };
        let right = |repository: &str, principal| {
            let (registry, repository) = ("reg.corp:5000".parse().unwrap(), repository.parse().unwrap());
            Right { registry, repository, rule: "f".into(), principal }
        };
        let rights =
            vec![right("team/app", Principal::Verified(Arc::new(holder))), right("open/base", Principal::Anonymous)];
        TokenGrant { rights, life: Duration::from_secs(300) }
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn sealed_token_opens_until_it_expires() {
        let issuer = TokenIssuer::new(None).unwrap();
        let token = issuer.seal(&grant(), now()).unwrap();
        assert_eq!(issuer.open(&token, now()), Some(grant()));
        assert_eq!(issuer.open(&token, now() + Duration::from_secs(301)), None);
        let nothing = TokenGrant { rights: Vec::new(), ..grant() };
        assert_eq!(issuer.open(&issuer.seal(&nothing, now()).unwrap(), now()), Some(nothing));
    }

    #[test]
    fn token_of_another_key_is_rejected() {
        let issuer = TokenIssuer::new(None).unwrap();
        let token = issuer.seal(&grant(), now()).unwrap();
        assert_eq!(TokenIssuer::new(None).unwrap().open(&token, now()), None);
        for text in ["", "a", "ey.ey.x", &"A".repeat(100_000)] {
            assert_eq!(issuer.open(text, now()), None);
        }
    }

    #[test]
    fn issuers_with_the_same_key_file_share_tokens() {
        fn named(file: &tempfile::NamedTempFile) -> KeyFile<'_> {
            KeyFile { key: "access.token_key_file", path: file.path() }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        let [one, other] = [0, 1].map(|_| TokenIssuer::new(Some(named(&file))).unwrap());
        assert_eq!(other.open(&one.seal(&grant(), now()).unwrap(), now()), Some(grant()));
        let secret = |text: &str| Secret::Password { username: "u".into(), password: text.into() };
        assert_eq!(one.principal_id(&secret("a")), other.principal_id(&secret("a")));
        assert_ne!(one.principal_id(&secret("a")), one.principal_id(&secret("b")));
        assert_ne!(
            one.principal_id(&Secret::Password { username: "ua".into(), password: String::new() }),
            one.principal_id(&secret("a"))
        );
        std::fs::write(file.path(), "short").unwrap();
        assert!(TokenIssuer::new(Some(named(&file))).err().unwrap().contains("access.token_key_file"));
    }
}
