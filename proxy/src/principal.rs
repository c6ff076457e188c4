//! Principals: whose credentials a request carries, for rules that leave authorization to the upstream.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;
use ring::digest::{SHA256, digest};

/// Whose rights a request has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// Any client: all may have what the rule's credentials can pull.
    Shared,
    /// Not authorized yet: the rule leaves authorization to the upstream.
    Unauthorized,
    /// A client without a credential: it gets what the upstream serves to anonymous clients.
    Anonymous,
    /// A client with its own credential.
    Verified(Arc<VerifiedPrincipal>),
}

/// A principal whose credential an upstream has accepted.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifiedPrincipal {
    pub id: PrincipalId,
    /// The `Authorization` for the upstream. None: the upstream was not reachable, so only the cache can be served.
    pub authorization: Option<HeaderValue>,
}

/// The keyed hash of a credential: it distinguishes principals without revealing the credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrincipalId(pub [u8; 16]);

impl PrincipalId {
    /// Of principals without a credential.
    pub const ANONYMOUS: Self = Self([0; 16]);

    /// Of a principal that a peer has authorized and requests for. It never equals the ID of a client of this node.
    pub fn forwarded(authorization: &HeaderValue) -> Self {
        let input = [b"dray forwarded\0", authorization.as_bytes()].concat();
        let mut id = [0; 16];
        id.copy_from_slice(&digest(&SHA256, &input).as_ref()[..16]);
        Self(id)
    }
}

impl Principal {
    /// Whether authorization is done or not needed.
    pub fn is_authorized(&self) -> bool {
        *self != Self::Unauthorized
    }

    pub fn principal_id(&self) -> PrincipalId {
        match self {
            Self::Verified(holder) => holder.id,
            Self::Shared | Self::Unauthorized | Self::Anonymous => PrincipalId::ANONYMOUS,
        }
    }

    /// The principal's own `Authorization` for the upstream.
    pub fn authorization(&self) -> Option<&HeaderValue> {
        self.holder()?.authorization.as_ref()
    }

    /// Whether it has a credential, but no `Authorization` for the upstream.
    pub fn lacks_authorization(&self) -> bool {
        self.holder().is_some() && self.authorization().is_none()
    }

    /// Whether its `Authorization` is the password itself, which may be wrong.
    pub fn has_password(&self) -> bool {
        self.authorization().is_some_and(|value| value.as_bytes().starts_with(b"Basic "))
    }

    /// Whether peers may send requests with its rights: with a token for one repository, never with a password.
    pub fn may_be_forwarded(&self) -> bool {
        self.holder().is_none() || self.authorization().is_some_and(|value| value.as_bytes().starts_with(b"Bearer "))
    }

    pub fn holder(&self) -> Option<&VerifiedPrincipal> {
        match self {
            Self::Verified(holder) => Some(holder),
            Self::Shared | Self::Unauthorized | Self::Anonymous => None,
        }
    }
}

impl fmt::Debug for VerifiedPrincipal {
    /// Never shows the `Authorization`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_is_never_lent_to_peers() {
        let holder = |text| {
            let authorization = Some(HeaderValue::from_static(text));
            Principal::Verified(Arc::new(VerifiedPrincipal { id: PrincipalId::ANONYMOUS, authorization }))
        };
        assert!(holder("Bearer x").may_be_forwarded() && Principal::Anonymous.may_be_forwarded());
        assert!(!holder("Basic eDp5").may_be_forwarded());
        let in_trouble = VerifiedPrincipal { id: PrincipalId::ANONYMOUS, authorization: None };
        assert!(!Principal::Verified(Arc::new(in_trouble)).may_be_forwarded());
        assert!(!format!("{:?}", holder("Basic eDp5")).contains("eDp5"));
    }
}
