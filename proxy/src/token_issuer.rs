//! What a client is given for its secret: a token that says what it may pull for some minutes, which it shows with
//! each request.
//!
//! A token is sealed: nobody else can make one, and nobody can read the registry's authorization in it. So dray remembers
//! no secret, and processes that share a key take each other's.

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

/// Seals tokens, and tells secrets apart.
pub struct TokenIssuer {
    sealing: Sealing,
    telling: hmac::Key,
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenGrant {
    /// None: somebody has logged in, and has asked for nothing yet.
    pub rights: Vec<Right>,
    pub life: Duration,
}

/// With whose rights a client is let into a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Right {
    pub registry: Registry,
    pub repository: Repository,
    pub caller: Principal,
}

/// What is sealed. Another meaning needs another [`MEANING`].
#[derive(Serialize, Deserialize)]
struct Sealed {
    expires: u64,
    rights: Vec<SealedRight>,
}

#[derive(Serialize, Deserialize)]
struct SealedRight {
    registry: String,
    repository: String,
    who: Option<[u8; 16]>,
    authorization: Option<String>,
}

const MEANING: &[u8] = b"dray grant 2";

/// More than any token is long that was made here, in characters.
const MAX_TOKEN: usize = 32 * 1024;

impl TokenIssuer {
    /// Keys of this process, or those that all processes have whose file has the same first line.
    pub fn new(key_file: Option<KeyFile<'_>>) -> Result<Self, String> {
        let secret = match key_file {
            Some(file) => file.lines()?.swap_remove(0).into_bytes(),
            None => {
                let mut bytes = vec![0; 32];
                SystemRandom::new().fill(&mut bytes).map_err(|_| "the system gives no random bytes".to_owned())?;
                bytes
            }
        };
        let sealing = Sealing::new(&secret, MEANING).ok_or_else(|| "no key can be made".to_owned())?;
        let telling = hmac::Key::new(HMAC_SHA256, &[b"dray telling 1", &secret[..]].concat());
        Ok(Self { sealing, telling })
    }

    /// Who has a secret.
    pub fn who(&self, secret: &Secret) -> PrincipalId {
        let text = match secret {
            Secret::Password { username, password } => format!("password\0{}\0{username}{password}", username.len()),
            Secret::Identity(token) => format!("identity\0{token}"),
            Secret::Bearer(token) => format!("bearer\0{token}"),
        };
        let mut who = [0; 16];
        who.copy_from_slice(&hmac::sign(&self.telling, text.as_bytes()).as_ref()[..16]);
        PrincipalId(who)
    }

    /// None: it cannot be said, since the registry's own token is too long.
    pub fn seal(&self, grant: &TokenGrant, now: SystemTime) -> Option<String> {
        let sealed = Sealed {
            // Not before it was said to end.
            expires: (now + grant.life + Duration::from_millis(999)).duration_since(UNIX_EPOCH).ok()?.as_secs(),
            rights: grant.rights.iter().map(Right::to_seal).collect::<Option<_>>()?,
        };
        let token = self.sealing.seal(&serde_json::to_vec(&sealed).ok()?)?;
        (token.len() <= MAX_TOKEN).then_some(token)
    }

    /// What a token says. None: it was not made here, or is too old.
    pub fn open(&self, token: &str, now: SystemTime) -> Option<TokenGrant> {
        let plain = (token.len() <= MAX_TOKEN).then(|| self.sealing.open(token.as_bytes()))??;
        let sealed: Sealed = serde_json::from_slice(&plain).ok()?;
        let life = (UNIX_EPOCH + Duration::from_secs(sealed.expires)).duration_since(now).ok()?;
        let rights = sealed.rights.into_iter().map(Right::opened).collect::<Option<_>>()?;
        Some(TokenGrant { rights, life })
    }
}

impl Right {
    fn to_seal(&self) -> Option<SealedRight> {
        let authorization = self.caller.authorization();
        Some(SealedRight {
            registry: self.registry.to_string(),
            repository: self.repository.to_string(),
            who: self.caller.holder().map(|holder| holder.who.0),
            authorization: authorization.map(|value| value.to_str().map(str::to_owned)).transpose().ok()?,
        })
    }

    fn opened(sealed: SealedRight) -> Option<Self> {
        let authorization = sealed.authorization.and_then(|text| sensitive(&text));
        let caller = match sealed.who {
            Some(who) => Principal::Holder(Arc::new(VerifiedPrincipal { who: PrincipalId(who), authorization })),
            None => Principal::Anonymous,
        };
        Some(Self { registry: sealed.registry.parse().ok()?, repository: sealed.repository.parse().ok()?, caller })
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
        let holder = VerifiedPrincipal { who: PrincipalId([7; 16]), authorization: sensitive("Bearer hush") };
        let right = |repository: &str, caller| {
            let (registry, repository) = ("reg.corp:5000".parse().unwrap(), repository.parse().unwrap());
            Right { registry, repository, caller }
        };
        let rights =
            vec![right("team/app", Principal::Holder(Arc::new(holder))), right("open/base", Principal::Anonymous)];
        TokenGrant { rights, life: Duration::from_secs(300) }
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn what_is_sealed_is_opened_while_it_lives() {
        let grants = TokenIssuer::new(None).unwrap();
        let token = grants.seal(&grant(), now()).unwrap();
        assert_eq!(grants.open(&token, now()), Some(grant()));
        assert_eq!(grants.open(&token, now() + Duration::from_secs(301)), None);
        let nothing = TokenGrant { rights: Vec::new(), ..grant() };
        assert_eq!(grants.open(&grants.seal(&nothing, now()).unwrap(), now()), Some(nothing));
    }

    #[test]
    fn what_others_made_opens_nothing() {
        let grants = TokenIssuer::new(None).unwrap();
        let token = grants.seal(&grant(), now()).unwrap();
        assert_eq!(TokenIssuer::new(None).unwrap().open(&token, now()), None);
        for text in ["", "a", "ey.ey.x", &"A".repeat(100_000)] {
            assert_eq!(grants.open(text, now()), None);
        }
    }

    #[test]
    fn processes_with_one_file_take_each_others_tokens() {
        fn named(file: &tempfile::NamedTempFile) -> KeyFile<'_> {
            KeyFile { key: "access.key_file", path: file.path() }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        let [one, other] = [0, 1].map(|_| TokenIssuer::new(Some(named(&file))).unwrap());
        assert_eq!(other.open(&one.seal(&grant(), now()).unwrap(), now()), Some(grant()));
        let secret = |text: &str| Secret::Password { username: "u".into(), password: text.into() };
        assert_eq!(one.who(&secret("a")), other.who(&secret("a")));
        assert_ne!(one.who(&secret("a")), one.who(&secret("b")));
        assert_ne!(
            one.who(&Secret::Password { username: "ua".into(), password: String::new() }),
            one.who(&secret("a"))
        );
        std::fs::write(file.path(), "short").unwrap();
        assert!(TokenIssuer::new(Some(named(&file))).err().unwrap().contains("access.key_file"));
    }
}
