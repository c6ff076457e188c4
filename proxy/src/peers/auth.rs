//! Authentication between peers: none, a shared key, or certificates (mTLS).

use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Method, Uri};
use reqwest::ClientBuilder;

use super::key::{PeerAuthError, Seal, SharedKey};
use crate::config::PeersConfig as Settings;
use crate::identity::{Identity, IdentityFiles, TrustedRole};

/// How this node authenticates to its peers, and they to it.
pub(super) enum PeerAuth {
    None,
    Key(SharedKey),
    Certificates(Arc<Identity>),
}

/// Trust in the sender of a request on the peers' port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerTrust {
    /// Not authenticated: gets only public content that a digest verifies.
    Unauthenticated,
    /// An authenticated peer with the same rule: gets what this node's own clients get.
    Authenticated,
}

impl PeerAuth {
    pub(super) fn load(settings: &Settings) -> Result<Self, String> {
        // The configuration's check has rejected both at once.
        match (&settings.key_file, &settings.mtls) {
            (None, None) => Ok(Self::None),
            (Some(path), _) => SharedKey::load(path).map(Self::Key),
            (None, Some(mtls)) => {
                let files = IdentityFiles {
                    table: "peers.mtls",
                    cert: mtls.cert.clone(),
                    key: mtls.key.clone(),
                    ca: Some(("ca", mtls.ca.clone())),
                    welcome: TrustedRole::SharedDnsName,
                };
                Identity::load(files).map(Self::Certificates)
            }
        }
    }

    pub(super) fn reload(&self) -> Result<(), String> {
        match self {
            Self::None => Ok(()),
            Self::Key(key) => key.reload(),
            Self::Certificates(identity) => identity.reload(),
        }
    }

    /// Configures the HTTP client for mTLS, where that is used.
    pub(super) fn prepare(&self, client: ClientBuilder) -> Result<ClientBuilder, String> {
        let Self::Certificates(identity) = self else { return Ok(client) };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(identity.verifier())
            .with_client_cert_resolver(identity.clone());
        // A resumed session would skip the check against an authority that has been replaced.
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(client.tls_backend_preconfigured(tls))
    }

    pub(super) fn scheme(&self) -> &'static str {
        if matches!(self, Self::Certificates(_)) { "https" } else { "http" }
    }

    /// Signs a request with the shared key. The seal verifies its response.
    pub(super) fn sign(&self, to: SocketAddr, method: &Method, path: &str, headers: &mut HeaderMap) -> Option<Seal> {
        match self {
            Self::Key(key) => Some(key.sign(to, method, path, headers)),
            Self::None | Self::Certificates(_) => None,
        }
    }

    /// Protects a registry credential in transit to a peer. None: without peer authentication it must not be sent.
    pub(super) fn seal(&self, authorization: &HeaderValue) -> Option<HeaderValue> {
        match self {
            Self::None => None,
            Self::Key(key) => key.seal(authorization),
            Self::Certificates(_) => Some(authorization.clone()),
        }
    }

    pub(super) fn open(&self, sealed: &HeaderValue) -> Option<HeaderValue> {
        match self {
            Self::None => None,
            Self::Key(key) => key.open(sealed),
            Self::Certificates(_) => Some(sealed.clone()),
        }
    }

    /// Authenticates the sender of a request to this node's address `at`, and returns what signs the response. With
    /// mTLS the listener has verified the certificate before.
    pub(super) fn check(
        &self,
        at: Option<SocketAddr>,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<(PeerTrust, Option<Seal>), PeerAuthError> {
        match self {
            Self::None => Ok((PeerTrust::Unauthenticated, None)),
            Self::Certificates(_) => Ok((PeerTrust::Authenticated, None)),
            Self::Key(key) => {
                let seal = key.check(at.ok_or(PeerAuthError::NotSigned)?, method, uri, headers)?;
                Ok((PeerTrust::Authenticated, Some(seal)))
            }
        }
    }
}
