//! Trusted certificates of upstreams, and dray's client certificate.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{AlertDescription, CertificateError, ClientConfig, Error};
use rustls_platform_verifier::Verifier;

use crate::config::ClientCert;
use crate::identity::{self, Identity, IdentityFiles, TrustedRole, verify_signatures};
use crate::source::causes;

/// The roots of the system and of the configuration, and pinned certificates.
#[derive(Debug)]
struct TrustRoots {
    roots: Verifier,
    /// A `ca` file may hold the server's own certificate. Docker's recipe for a private registry makes a certificate
    /// that is its own authority: chain validation rejects it, OpenSSL and Go accept it.
    pinned: Vec<CertificateDer<'static>>,
}

/// For one rule: `extra` are roots for all rules, `of_rule` those of its `ca`.
pub(super) fn config(
    extra: &[CertificateDer<'static>],
    of_rule: Vec<CertificateDer<'static>>,
    identity: Option<Arc<Identity>>,
) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = extra.iter().chain(&of_rule).cloned();
    let roots = Verifier::new_with_extra_roots(roots, provider.clone())
        .map_err(|error| format!("no trusted root certificates: {error}; install the package ca-certificates"))?;
    let pinned = extra.iter().cloned().chain(of_rule).collect();
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(TrustRoots { roots, pinned }));
    Ok(match identity {
        Some(identity) => builder.with_client_cert_resolver(identity),
        None => builder.with_no_client_auth(),
    })
}

/// The client certificate for upstreams.
pub(super) fn identity(files: &ClientCert) -> Result<Arc<Identity>, String> {
    let ClientCert { cert, key } = files.clone();
    Identity::load(IdentityFiles {
        table: "registry.client_cert",
        cert,
        key,
        ca: None,
        welcome: TrustedRole::AnyCertificate,
    })
}

/// Reads a PEM bundle that a key of the configuration names.
pub(super) fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("{key} = \"{}\": {why}", path.display());
    let pem = std::fs::read(path).map_err(|error| wrong(&error))?;
    identity::certificates(&pem).map_err(|error| wrong(&error))
}

/// What to do about a TLS error, if known.
pub(super) fn advice(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    causes(error).find_map(|cause| match cause.downcast_ref::<Error>()? {
        // `Other` is a certificate that is its own authority.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)) => {
            Some("set `ca` of its [[registry]] rule to the authority that signed it, or to the certificate itself")
        }
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            Some("the upstream's certificate has expired: renew it there")
        }
        Error::AlertReceived(AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion) => Some(
            "the upstream and dray have no TLS version, cipher or signature algorithm in common, or the upstream \
             requires a `client_cert` of its [[registry]] rule",
        ),
        Error::AlertReceived(_) => {
            Some("the upstream rejected the connection: it may require a `client_cert` of its [[registry]] rule")
        }
        _ => None,
    })
}

impl ServerCertVerifier for TrustRoots {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.roots.verify_server_cert(end_entity, intermediates, name, ocsp_response, now) {
            Err(error) if !is_about_time(&error) && self.is_pinned(end_entity) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    verify_signatures!();
}

impl TrustRoots {
    fn is_pinned(&self, end_entity: &CertificateDer<'_>) -> bool {
        self.pinned.iter().any(|pinned| pinned.as_ref() == end_entity.as_ref())
    }
}

/// Whether a certificate is expired or not yet valid. Validation checks the time first, so no other error of a pinned
/// certificate hides it.
fn is_about_time(error: &Error) -> bool {
    let Error::InvalidCertificate(error) = error else { return false };
    matches!(
        error,
        CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. }
    )
}
