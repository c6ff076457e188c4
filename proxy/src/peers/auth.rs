//! How peers know each other: not at all, by a secret that they share, or by certificates.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Method, Uri};
use reqwest::ClientBuilder;

use super::key::{PeerAuthError, Seal, SharedKey};
use crate::config::PeersConfig as Settings;
use crate::identity::{Identity, IdentityFiles, TrustedRole};

/// What this process shows its peers, and asks of them.
pub(super) enum PeerAuth {
    None,
    Key(SharedKey),
    Certificates(Arc<Identity>),
}

/// Who connects to the peers' port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerTrust {
    /// Anybody: gets what a digest proves and everybody may have.
    Stranger,
    /// A dray that has proven it, and whose rules are ours: gets what our own clients get.
    Member,
}

impl PeerAuth {
    pub(super) fn load(settings: &Settings) -> Result<Self, String> {
        // The configuration has refused both at once.
        match (&settings.key_file, &settings.mtls) {
            (None, None) => Ok(Self::None),
            (Some(path), _) => SharedKey::load(path).map(Self::Key),
            (None, Some(mtls)) => {
                let files = IdentityFiles {
                    table: "peers.mtls",
                    cert: mtls.cert.clone(),
                    key: mtls.key.clone(),
                    ca: Some(("ca", mtls.ca.clone())),
                    welcome: TrustedRole::Namesakes,
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

    /// Connects as a peer does.
    pub(super) fn prepare(&self, client: ClientBuilder) -> Result<ClientBuilder, String> {
        let Self::Certificates(identity) = self else { return Ok(client) };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(identity.verifier())
            .with_client_cert_resolver(identity.clone());
        // An authority that is no longer believed ends with the connection.
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(client.tls_backend_preconfigured(tls))
    }

    pub(super) fn scheme(&self) -> &'static str {
        if matches!(self, Self::Certificates(_)) { "https" } else { "http" }
    }

    /// Proves a question, and gives what its answer is proven with.
    pub(super) fn sign(&self, to: SocketAddr, method: &Method, path: &str, headers: &mut HeaderMap) -> Option<Seal> {
        match self {
            Self::Key(key) => Some(key.sign(to, method, path, headers)),
            Self::None | Self::Certificates(_) => None,
        }
    }

    /// Makes what a registry is shown safe to be sent to a peer. None: it cannot be.
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

    /// Whether whoever asks is a peer, and what proves the answer; `at` is the address where this node is
    /// asked. The listener has held certificates against the authority before.
    pub(super) fn check(
        &self,
        at: Option<SocketAddr>,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<(PeerTrust, Option<Seal>), PeerAuthError> {
        match self {
            Self::None => Ok((PeerTrust::Stranger, None)),
            Self::Certificates(_) => Ok((PeerTrust::Member, None)),
            Self::Key(key) => {
                let seal = key.check(at.ok_or(PeerAuthError::NotSigned)?, method, uri, headers)?;
                Ok((PeerTrust::Member, Some(seal)))
            }
        }
    }
}
