//! A certificate, its key and the CA that verifies the other side, from files that may be replaced while dray runs, as
//! cert-manager does.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DistinguishedName, Error, InconsistentKeys, RootCertStore, SignatureScheme};

/// The signatures of a handshake, which every verifier checks in the same way.
macro_rules! verify_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &rustls::pki_types::CertificateDer<'_>,
            dss: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
            rustls::crypto::verify_tls12_signature(message, cert, dss, &algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &rustls::pki_types::CertificateDer<'_>,
            dss: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
        }
    };
}
pub(crate) use verify_signatures;

/// The PEM files of an identity, and their keys in the configuration.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    pub table: &'static str,
    pub cert: PathBuf,
    pub key: PathBuf,
    pub ca: Option<(&'static str, PathBuf)>,
    pub welcome: TrustedRole,
}

/// The certificate that this process presents, and the CA that it trusts.
pub struct Identity {
    files: IdentityFiles,
    current: ArcSwap<Loaded>,
}

struct Loaded {
    /// The files' content, to detect changes.
    read: Vec<u8>,
    certified: Arc<CertifiedKey>,
    /// The DNS names of the certificate.
    names: Vec<ServerName<'static>>,
    trusted: Option<Trusted>,
}

struct Trusted {
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<WebPkiServerVerifier>,
}

/// Which certificates of the CA are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrustedRole {
    AnyCertificate,
    /// Certificates for at least one DNS name of this node's own certificate.
    SharedDnsName,
}

/// Verifies the other side's certificate against the CA.
#[derive(Debug)]
pub struct PeerVerifier {
    identity: Arc<Identity>,
}

impl Identity {
    pub fn load(files: IdentityFiles) -> Result<Arc<Self>, String> {
        let current = Loaded::read(&files)?;
        Ok(Arc::new(Self { files, current: ArcSwap::from_pointee(current) }))
    }

    /// Reloads the files. An error leaves everything unchanged: the files may be replaced one by one.
    pub fn reload(&self) -> Result<(), String> {
        let loaded = Loaded::read(&self.files)?;
        if loaded.read != self.current.load().read {
            tracing::info!(file = %self.files.cert.display(), "certificate reloaded");
            self.current.store(Arc::new(loaded));
        }
        Ok(())
    }

    /// The verifier for incoming and outgoing connections.
    pub fn verifier(self: &Arc<Self>) -> Arc<PeerVerifier> {
        Arc::new(PeerVerifier { identity: self.clone() })
    }

    /// Whether the listener requires client certificates.
    pub fn requires_client_certificates(&self) -> bool {
        self.files.ca.is_some()
    }
}

impl Loaded {
    fn read(files: &IdentityFiles) -> Result<Self, String> {
        let wrong = |what: &str, path: &Path, why: &dyn fmt::Display| {
            format!("{}.{what} = \"{}\": {why}", files.table, path.display())
        };
        let read = |what: &str, path: &Path| std::fs::read(path).map_err(|error| wrong(what, path, &error));
        let (cert, key) = (read("cert", &files.cert)?, read("key", &files.key)?);
        let chain = certificates(&cert).map_err(|why| wrong("cert", &files.cert, &why))?;
        let private = PrivateKeyDer::from_pem_slice(&key).map_err(|why| wrong("key", &files.key, &why))?;
        let private = provider().key_provider.load_private_key(private);
        let private = private.map_err(|why| wrong("key", &files.key, &why))?;
        let certified = CertifiedKey::new(chain, private);
        match certified.keys_match() {
            Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            // Of X.509 version 1, which rustls does not parse: the other side may accept it.
            Err(Error::InvalidCertificate(_)) if files.welcome == TrustedRole::AnyCertificate => {}
            Err(why) => return Err(wrong("cert", &files.cert, &format!("does not match the key: {why}"))),
        }
        let names = match files.welcome {
            TrustedRole::AnyCertificate => Vec::new(),
            TrustedRole::SharedDnsName => names(&certified).map_err(|why| wrong("cert", &files.cert, &why))?,
        };
        if names.is_empty() && files.welcome == TrustedRole::SharedDnsName {
            return Err(wrong("cert", &files.cert, &"has no DNS name, by which peers authenticate each other"));
        }
        let mut read_all = [cert, key].concat();
        let trusted = match &files.ca {
            Some((what, path)) => {
                let ca = read(what, path)?;
                let trusted = Trusted::new(&ca).map_err(|why| wrong(what, path, &why))?;
                read_all.extend(ca);
                Some(trusted)
            }
            None => None,
        };
        Ok(Self { read: read_all, certified: Arc::new(certified), names, trusted })
    }
}

impl Trusted {
    fn new(pem: &[u8]) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem)? {
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider()).build();
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider()).build();
        Ok(Self {
            clients: clients.map_err(|error| error.to_string())?,
            servers: servers.map_err(|error| error.to_string())?,
        })
    }
}

/// The certificates of a PEM bundle: at least one.
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| error.to_string())?;
    if found.is_empty() { Err("contains no PEM certificate".to_owned()) } else { Ok(found) }
}

fn names(certified: &CertifiedKey) -> Result<Vec<ServerName<'static>>, String> {
    let end = certified.end_entity_cert().map_err(|error| error.to_string())?;
    let end = webpki::EndEntityCert::try_from(end).map_err(|error| error.to_string())?;
    Ok(end.valid_dns_names().filter_map(|name| ServerName::try_from(name.to_owned()).ok()).collect())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl PeerVerifier {
    fn trusted<T>(&self, with: impl FnOnce(&Trusted) -> Result<T, Error>) -> Result<T, Error> {
        let current = self.identity.current.load();
        let none = || Error::General("no CA is configured to verify certificates".into());
        with(current.trusted.as_ref().ok_or_else(none)?)
    }

    fn check_name(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        if self.identity.files.welcome == TrustedRole::AnyCertificate {
            return Ok(());
        }
        let parsed = ParsedCertificate::try_from(certificate)?;
        let current = self.identity.current.load();
        let shares_name = current.names.iter().any(|name| verify_server_name(&parsed, name).is_ok());
        if shares_name { Ok(()) } else { Err(CertificateError::NotValidForName.into()) }
    }
}

impl ClientCertVerifier for PeerVerifier {
    /// CA names are only hints to clients, and change with the file.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.trusted(|trusted| trusted.clients.verify_client_cert(end_entity, intermediates, now))?;
        self.check_name(end_entity)?;
        Ok(verified)
    }

    verify_signatures!();
}

impl ServerCertVerifier for PeerVerifier {
    /// A peer's `name` is an address, which its certificate does not have: it must share a name of this node's
    /// certificate.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let current = self.identity.current.load();
        let names = match self.identity.files.welcome {
            TrustedRole::AnyCertificate => std::slice::from_ref(name),
            TrustedRole::SharedDnsName => &current.names,
        };
        let mut last = CertificateError::NotValidForName.into();
        for name in names {
            let verified = self.trusted(|trusted| {
                trusted.servers.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
            });
            match verified {
                Ok(verified) => return Ok(verified),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    verify_signatures!();
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load().certified.clone())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl fmt::Debug for Identity {
    /// Without the key, so that it never reaches a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("files", &self.files).finish_non_exhaustive()
    }
}
