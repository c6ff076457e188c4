//! A certificate authority for tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use tokio_rustls::TlsAcceptor;

/// A CA with its certificate in a file.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub ca_file: PathBuf,
    certificate: CertificateDer<'static>,
    dir: PathBuf,
}

/// A certificate and its key, as files.
pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new(dir: &Path) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Without its own name, OpenSSL treats issued certificates as self-signed.
        params.distinguished_name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().expect("a key");
        let cert = params.self_signed(&key).expect("a certificate");
        let ca_file = dir.join("ca.pem");
        std::fs::write(&ca_file, cert.pem()).expect("the CA is written");
        let certificate = cert.der().clone();
        Self { issuer: Issuer::new(params, key), ca_file, certificate, dir: dir.to_owned() }
    }

    pub fn files(&self, names: &[&str]) -> Files {
        let (cert, key) = self.issue(names);
        let path = |end: &str| self.dir.join(format!("{}.{end}", names[0]));
        let files = Files { cert: path("crt"), key: path("key") };
        std::fs::write(&files.cert, cert.pem()).expect("the certificate is written");
        std::fs::write(&files.key, key.serialize_pem()).expect("the key is written");
        files
    }

    pub fn acceptor(&self, names: &[&str]) -> TlsAcceptor {
        let (cert, key) = self.issue(names);
        acceptor(&cert, &key, None)
    }

    /// The same, but only for clients with a certificate of this authority.
    pub fn acceptor_with_client_auth(&self, names: &[&str]) -> TlsAcceptor {
        let (cert, key) = self.issue(names);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("a root");
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider());
        acceptor(&cert, &key, Some(clients.build().expect("a verifier")))
    }

    fn issue(&self, names: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).expect("names");
        let key = KeyPair::generate().expect("a key");
        (params.signed_by(&key, &self.issuer).expect("a certificate"), key)
    }
}

/// A self-signed certificate in a file, as in Docker's instructions for a private registry.
pub fn self_signed(dir: &Path, names: &[&str]) -> (PathBuf, TlsAcceptor) {
    self_signed_until(dir, names, 4000)
}

/// The same, valid until the start of a year.
pub fn self_signed_until(dir: &Path, names: &[&str], year: i32) -> (PathBuf, TlsAcceptor) {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).expect("names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    let key = KeyPair::generate().expect("a key");
    let cert = params.self_signed(&key).expect("a certificate");
    let file = dir.join("self-signed.crt");
    std::fs::write(&file, cert.pem()).expect("the certificate is written");
    (file, acceptor(&cert, &key, None))
}

fn acceptor(cert: &rcgen::Certificate, key: &KeyPair, clients: Option<Arc<dyn ClientCertVerifier>>) -> TlsAcceptor {
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let config = rustls::ServerConfig::builder_with_provider(provider());
    let config = config.with_safe_default_protocol_versions().expect("versions");
    let config = match clients {
        Some(clients) => config.with_client_cert_verifier(clients),
        None => config.with_no_client_auth(),
    };
    let config = config.with_single_cert(vec![cert.der().clone()], key);
    TlsAcceptor::from(Arc::new(config.expect("a certificate that fits its key")))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
