//! With whose rights a registry is asked, where a rule says that they are the caller's own.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;
use ring::digest::{SHA256, digest};

/// Whose rights a question is asked with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// What the rule can pull, everybody may have.
    Everyone,
    /// The rule asks who it is, and nobody has been let in.
    Unknown,
    /// Somebody without a secret: gets what the registry gives to anybody.
    Anonymous,
    /// Somebody with a secret of their own.
    Holder(Arc<VerifiedPrincipal>),
}

/// Somebody whose secret a registry has taken.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifiedPrincipal {
    pub who: PrincipalId,
    /// What the registry is shown. None: it could not be asked, so there is only what is here.
    pub authorization: Option<HeaderValue>,
}

/// A secret's keyed hash: tells callers apart, and tells nobody the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrincipalId(pub [u8; 16]);

impl PrincipalId {
    /// Those without a secret.
    pub const NOBODY: Self = Self([0; 16]);

    /// Whoever another dray asks for, which has let them in. Never taken for somebody who asks here.
    pub fn lent(authorization: &HeaderValue) -> Self {
        let told = [b"dray lent\0", authorization.as_bytes()].concat();
        let mut who = [0; 16];
        who.copy_from_slice(&digest(&SHA256, &told).as_ref()[..16]);
        Self(who)
    }
}

impl Principal {
    /// Whether somebody has looked at who it is, or nobody need.
    pub fn is_let_in(&self) -> bool {
        *self != Self::Unknown
    }

    pub fn who(&self) -> PrincipalId {
        match self {
            Self::Holder(holder) => holder.who,
            Self::Everyone | Self::Unknown | Self::Anonymous => PrincipalId::NOBODY,
        }
    }

    /// What the registry is shown that is the caller's own.
    pub fn authorization(&self) -> Option<&HeaderValue> {
        self.holder()?.authorization.as_ref()
    }

    /// Whether the registry can be asked nothing in its name.
    pub fn is_empty_handed(&self) -> bool {
        self.holder().is_some() && self.authorization().is_none()
    }

    /// Whether what the registry is shown is a secret itself, which may be a wrong one.
    pub fn shows_secret(&self) -> bool {
        self.authorization().is_some_and(|value| value.as_bytes().starts_with(b"Basic "))
    }

    /// Whether other nodes may ask the registry in its name: by a token for one repository, never by a secret.
    pub fn may_be_lent(&self) -> bool {
        self.holder().is_none() || self.authorization().is_some_and(|value| value.as_bytes().starts_with(b"Bearer "))
    }

    pub fn holder(&self) -> Option<&VerifiedPrincipal> {
        match self {
            Self::Holder(holder) => Some(holder),
            Self::Everyone | Self::Unknown | Self::Anonymous => None,
        }
    }
}

impl fmt::Debug for VerifiedPrincipal {
    /// Never what the registry is shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").field("who", &self.who).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_lent() {
        let holder = |text| {
            let authorization = Some(HeaderValue::from_static(text));
            Principal::Holder(Arc::new(VerifiedPrincipal { who: PrincipalId::NOBODY, authorization }))
        };
        assert!(holder("Bearer x").may_be_lent() && Principal::Anonymous.may_be_lent());
        assert!(!holder("Basic eDp5").may_be_lent());
        let in_trouble = VerifiedPrincipal { who: PrincipalId::NOBODY, authorization: None };
        assert!(!Principal::Holder(Arc::new(in_trouble)).may_be_lent());
        assert!(!format!("{:?}", holder("Basic eDp5")).contains("eDp5"));
    }
}
