//! A secret that all peers share: it authenticates each request between peers and each response.
//!
//! A request carries `dray-auth: <milliseconds since 1970> <mac>`, its response `dray-auth: <mac>`. The mac is the
//! HMAC-SHA256, in hexadecimal, of the text that [`request_text`] or [`response_text`] writes, headers included.
//!
//! - A request is valid for one peer address only.
//! - A response's mac covers its request's mac, so it is valid for that request only.
//! - Bodies are not signed: the digest that a response names verifies them.
//! - Only a client's credentials for the registry are encrypted: [`SharedKey::seal`].

use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use http::header::{AGE, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use ring::hmac::{self, HMAC_SHA256};

use super::wire;
use crate::key_file::KeyFile;
use crate::sealing::Sealing;

/// The keys of a file, which [`Self::reload`] reads again.
pub(super) struct SharedKey {
    path: PathBuf,
    keys: ArcSwap<Keys>,
}

/// The first key signs and seals; all keys are accepted, so that a key can be rotated without an outage.
struct Keys {
    lines: Vec<String>,
    keys: Vec<hmac::Key>,
    sealing: Vec<Sealing>,
}

/// A signed request, on either side: signs or verifies its response.
#[derive(Clone)]
pub struct Seal {
    key: hmac::Key,
    request: HeaderValue,
}

/// Why a request is not authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAuthError {
    NotSigned,
    /// Signed with another key, signed for another address, or changed in transit.
    WrongKey,
    /// Its time differs from this node's by more than `MAX_CLOCK_SKEW`.
    OtherTime,
}

const AUTH: HeaderName = HeaderName::from_static("dray-auth");

/// Largest difference of two nodes' clocks. Larger: an intercepted request can be replayed for longer. Smaller: clock
/// drift breaks authentication.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(60);

const SEALING_CONTEXT: &[u8] = b"dray authorization 1";

impl SharedKey {
    pub(super) fn load(path: &Path) -> Result<Self, String> {
        let keys = Keys::read(path)?;
        Ok(Self { path: path.to_owned(), keys: ArcSwap::from_pointee(keys) })
    }

    /// Reloads the file. An error leaves the keys unchanged.
    pub(super) fn reload(&self) -> Result<(), String> {
        let keys = Keys::read(&self.path)?;
        if keys.lines != self.keys.load().lines {
            tracing::info!(file = %self.path.display(), keys = keys.keys.len(), "peer key reloaded");
            self.keys.store(Arc::new(keys));
        }
        Ok(())
    }

    /// Adds the header that signs a request to the peer at `to`.
    pub(super) fn sign(&self, to: SocketAddr, method: &Method, path: &str, headers: &mut HeaderMap) -> Seal {
        let key = self.keys.load().keys[0].clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let mac = hmac::sign(&key, request_text(now, to, method, path, headers).as_bytes());
        let header = HeaderValue::from_str(&format!("{now} {}", hex(mac.as_ref()))).expect("digits fit a header");
        headers.insert(AUTH, header.clone());
        Seal { key, request: header }
    }

    /// Verifies that a request was signed with the key, for the address `at` of this node.
    pub(super) fn check(
        &self,
        at: SocketAddr,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Seal, PeerAuthError> {
        let header = headers.get(AUTH).ok_or(PeerAuthError::NotSigned)?;
        let (time, mac) = header.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(PeerAuthError::NotSigned)?;
        let time: u64 = time.parse().map_err(|_| PeerAuthError::NotSigned)?;
        let mac = from_hex(mac).ok_or(PeerAuthError::NotSigned)?;
        let path = uri.path_and_query().map_or("", |path| path.as_str());
        let text = request_text(time, at, method, path, headers);
        let keys = self.keys.load();
        let key = keys.keys.iter().find(|key| hmac::verify(key, text.as_bytes(), &mac).is_ok());
        let key = key.ok_or(PeerAuthError::WrongKey)?.clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if now.abs_diff(Duration::from_millis(time)) > MAX_CLOCK_SKEW {
            return Err(PeerAuthError::OtherTime);
        }
        Ok(Seal { key, request: header.clone() })
    }
}

impl SharedKey {
    /// Encrypts a text for peers with the same key.
    pub(super) fn seal(&self, text: &HeaderValue) -> Option<HeaderValue> {
        let sealed = self.keys.load().sealing.first()?.seal(text.as_bytes())?;
        HeaderValue::from_str(&sealed).ok()
    }

    /// Decrypts what [`Self::seal`] made. None: made with another key, or changed.
    pub(super) fn open(&self, sealed: &HeaderValue) -> Option<HeaderValue> {
        let keys = self.keys.load();
        let plain = keys.sealing.iter().find_map(|key| key.open(sealed.as_bytes()))?;
        HeaderValue::from_bytes(&plain).ok()
    }
}

impl Keys {
    fn read(path: &Path) -> Result<Self, String> {
        let file = KeyFile { key: "peers.key_file", path };
        let lines = file.lines()?;
        let keys = lines.iter().map(|line| hmac::Key::new(HMAC_SHA256, line.as_bytes())).collect();
        let sealing = lines.iter().map(|line| Sealing::new(line.as_bytes(), SEALING_CONTEXT)).collect::<Option<_>>();
        let sealing = sealing.ok_or_else(|| file.wrong("cannot be used as a key"))?;
        Ok(Self { lines, keys, sealing })
    }
}

impl Seal {
    /// The header that signs the response.
    pub fn sign(&self, status: u16, headers: &HeaderMap) -> (HeaderName, HeaderValue) {
        let mac = hmac::sign(&self.key, response_text(&self.request, status, headers).as_bytes());
        (AUTH, HeaderValue::from_str(&hex(mac.as_ref())).expect("digits fit a header"))
    }

    /// Whether a response was signed with the key, for this request.
    pub(super) fn verifies(&self, status: u16, headers: &HeaderMap) -> bool {
        let mac = headers.get(AUTH).and_then(|value| value.to_str().ok()).and_then(from_hex);
        let text = response_text(&self.request, status, headers);
        mac.is_some_and(|mac| hmac::verify(&self.key, text.as_bytes(), &mac).is_ok())
    }
}

impl fmt::Debug for Seal {
    /// Without the key, so that it never reaches a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal").field("request", &self.request).finish_non_exhaustive()
    }
}

impl PeerAuthError {
    /// For the operator of the peer that sent the request: it is the body of the 401.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotSigned => {
                "the request is not signed, but this node requires a shared key: set peers.key_file on the sender"
            }
            Self::WrongKey => {
                "the signature is not valid: the keys in peers.key_file differ, or the request was signed for another address"
            }
            Self::OtherTime => "the request was signed more than a minute from this node's time: compare the clocks",
        }
    }
}

fn request_text(time: u64, to: SocketAddr, method: &Method, path: &str, headers: &HeaderMap) -> String {
    let (address, port) = (to.ip().to_canonical(), to.port());
    let mut text = format!("dray request\n{time}\n{address} {port}\n{method}\n{path}\n");
    write_headers(&mut text, headers, &[RANGE, CACHE_CONTROL]);
    text
}

fn response_text(request: &HeaderValue, status: u16, headers: &HeaderMap) -> String {
    let mut text = format!("dray response\n{}\n{status}\n", request.to_str().unwrap_or_default());
    let more = [CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, AGE, wire::CONTENT_DIGEST, wire::SOURCE];
    write_headers(&mut text, headers, &more);
    text
}

/// The headers that peers interpret, sorted by name.
fn write_headers(text: &mut String, headers: &HeaderMap, more: &[HeaderName]) {
    let is_interpreted =
        |name: &HeaderName| (name.as_str().starts_with("dray-") && *name != AUTH) || more.contains(name);
    let mut lines: Vec<String> = headers
        .iter()
        .filter(|(name, _)| is_interpreted(name))
        .map(|(name, value)| format!("{name}:{}\n", String::from_utf8_lossy(value.as_bytes())))
        .collect();
    lines.sort_unstable();
    lines.iter().for_each(|line| text.push_str(line));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    (digits.len() == 64).then(|| digits.chunks(2).map(pair).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/v2/a/manifests/1?ns=docker.io";

    fn key(text: &str) -> SharedKey {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        SharedKey::load(file.path()).unwrap()
    }

    fn request_headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(wire::REQUEST, "role=global".parse().unwrap());
        headers.insert("accept", "*/*".parse().unwrap());
        headers
    }

    fn server() -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], 5052))
    }

    fn check(key: &SharedKey, path: &str, headers: &HeaderMap) -> Result<Seal, PeerAuthError> {
        key.check(server(), &Method::GET, &path.parse().unwrap(), headers)
    }

    #[test]
    fn request_and_response_need_the_same_key() {
        let ours = key("0123456789abcdef-ours\n");
        let mut headers = request_headers();
        assert_eq!(check(&ours, PATH, &headers).err(), Some(PeerAuthError::NotSigned));
        let seal = ours.sign(server(), &Method::GET, PATH, &mut headers);
        let theirs = check(&ours, PATH, &headers).ok().unwrap();
        assert_eq!(check(&key("0123456789abcdef-other"), PATH, &headers).err(), Some(PeerAuthError::WrongKey));
        assert_eq!(check(&ours, "/v2/b/manifests/1?ns=docker.io", &headers).err(), Some(PeerAuthError::WrongKey));
        assert_eq!(
            ours.check(SocketAddr::from(([192, 0, 2, 2], 5052)), &Method::GET, &PATH.parse().unwrap(), &headers).err(),
            Some(PeerAuthError::WrongKey),
            "for another peer"
        );
        let mapped = "[::ffff:192.0.2.1]:5052".parse().unwrap();
        assert!(ours.check(mapped, &Method::GET, &PATH.parse().unwrap(), &headers).is_ok(), "the same address");
        assert_eq!(
            ours.check(server(), &Method::HEAD, &PATH.parse().unwrap(), &headers).err(),
            Some(PeerAuthError::WrongKey),
            "another method"
        );
        let mut changed = headers.clone();
        changed.insert(wire::REQUEST, "role=zone".parse().unwrap());
        assert_eq!(check(&ours, PATH, &changed).err(), Some(PeerAuthError::WrongKey));
        changed = headers.clone();
        changed.insert("accept", "text/plain".parse().unwrap());
        changed.insert("x-other", "1".parse().unwrap());
        assert!(check(&ours, PATH, &changed).is_ok(), "peers do not interpret these");

        let mut response = HeaderMap::new();
        response.insert(wire::CONTENT_DIGEST, "sha256:x".parse().unwrap());
        let (name, value) = theirs.sign(200, &response);
        response.insert(name, value);
        assert!(seal.verifies(200, &response));
        assert!(!seal.verifies(404, &response));
        response.insert(wire::CONTENT_DIGEST, "sha256:y".parse().unwrap());
        assert!(!seal.verifies(200, &response));
        assert!(!seal.verifies(200, &HeaderMap::new()));
    }

    #[test]
    fn sealed_text_is_opened_only_with_the_key() {
        let text = HeaderValue::from_static("Bearer hush");
        let (before, both) = (key("0123456789-before\n"), key("0123456789-after\n0123456789-before\n"));
        let sealed = before.seal(&text).unwrap();
        assert!(!sealed.to_str().unwrap().contains("hush"));
        assert_eq!(both.open(&sealed), Some(text.clone()));
        assert_eq!(before.open(&both.seal(&text).unwrap()), None);
        assert_eq!(["", "AAAA", "Bearer hush"].map(|other| before.open(&other.parse().unwrap())), [const { None }; 3]);
    }

    /// Releases that sign other text cannot authenticate each other.
    #[test]
    fn signed_text_is_the_same_in_all_releases() {
        let request = request_text(1, server(), &Method::GET, PATH, &request_headers());
        assert_eq!(request, format!("dray request\n1\n192.0.2.1 5052\nGET\n{PATH}\ndray-request:role=global\n"));
        let headers = HeaderMap::from_iter([(wire::CONTENT_DIGEST, "sha256:x".parse().unwrap())]);
        let response = response_text(&"1 00".parse().unwrap(), 200, &headers);
        assert_eq!(response, "dray response\n1 00\n200\ndocker-content-digest:sha256:x\n");
    }

    #[test]
    fn old_request_is_rejected() {
        let ours = key("0123456789abcdef-ours");
        let mut headers = request_headers();
        let old = UNIX_EPOCH.elapsed().unwrap().as_millis() - 61_000;
        let old = u64::try_from(old).unwrap();
        let mac =
            hmac::sign(&ours.keys.load().keys[0], request_text(old, server(), &Method::GET, PATH, &headers).as_bytes());
        headers.insert(AUTH, format!("{old} {}", hex(mac.as_ref())).parse().unwrap());
        assert_eq!(check(&ours, PATH, &headers).err(), Some(PeerAuthError::OtherTime));
    }

    #[test]
    fn key_rotates_without_an_outage() {
        let (before, both, after) =
            ("0123456789-before\n", "0123456789-after\n0123456789-before\n", "0123456789-after");
        for (client_keys, server_keys) in [(before, both), (both, both), (both, after), (after, both)] {
            let mut headers = request_headers();
            let seal = key(client_keys).sign(server(), &Method::GET, PATH, &mut headers);
            let theirs = check(&key(server_keys), PATH, &headers).ok().unwrap();
            let (name, value) = theirs.sign(200, &HeaderMap::new());
            assert!(seal.verifies(200, &HeaderMap::from_iter([(name, value)])));
        }
    }

    #[test]
    fn key_file_is_reloaded_unless_it_is_invalid() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789-before").unwrap();
        let key = SharedKey::load(file.path()).unwrap();
        let signed = |key: &SharedKey| {
            let mut headers = request_headers();
            key.sign(server(), &Method::GET, PATH, &mut headers);
            headers
        };
        let old = signed(&key);
        for wrong in ["", "short"] {
            std::fs::write(file.path(), wrong).unwrap();
            assert!(key.reload().unwrap_err().contains("peers.key_file"));
            assert!(check(&key, PATH, &old).is_ok());
        }
        std::fs::write(file.path(), "0123456789-after").unwrap();
        key.reload().unwrap();
        assert_eq!(check(&key, PATH, &old).err(), Some(PeerAuthError::WrongKey));
        assert!(check(&key, PATH, &signed(&key)).is_ok());
    }

    #[test]
    fn malformed_mac_is_rejected() {
        let ours = key("0123456789abcdef-ours");
        for text in ["", "1", "x 00", "1 00", &format!("1 {}", "é".repeat(32)), &format!("1 +{}", "0".repeat(63))] {
            let headers = HeaderMap::from_iter([(AUTH, HeaderValue::from_bytes(text.as_bytes()).unwrap())]);
            let error = check(&ours, PATH, &headers).err();
            assert!(matches!(error, Some(PeerAuthError::NotSigned | PeerAuthError::WrongKey)), "{text}");
        }
    }
}
