//! A secret that all peers share: whoever knows it proves each question and each answer.
//!
//! A question carries `dray-auth: <milliseconds since 1970> <mac>`, its answer `dray-auth: <mac>`. The
//! mac is the HMAC-SHA256, in hexadecimal, of the lines that [`question`] and [`answer`] write: who is
//! asked for what, and what is answered, headers included. A question is good for nobody else, and an
//! answer, with its question's mac, for no other question. Bodies are proven by the digest that an answer names.
//! Only what a registry is shown for a client is encrypted: [`SharedKey::seal`].

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

/// The keys of a file, read again when it changes.
pub(super) struct SharedKey {
    path: PathBuf,
    keys: ArcSwap<Keys>,
}

/// The first signs and seals; all are believed, so that a key can be changed without a gap.
struct Keys {
    lines: Vec<String>,
    keys: Vec<hmac::Key>,
    sealing: Vec<Sealing>,
}

/// A question that was signed, by whoever asks or is asked: what its answer is proven with.
#[derive(Clone)]
pub struct Seal {
    key: hmac::Key,
    question: HeaderValue,
}

/// Why a question is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAuthError {
    NotSigned,
    /// Signed with another key or for somebody else, or changed on its way.
    WrongKey,
    /// Signed too long ago, or in the future.
    OtherTime,
}

const AUTH: HeaderName = HeaderName::from_static("dray-auth");

/// What may stand between two clocks, and how long a question that somebody overheard can be repeated.
const CLOCKS: Duration = Duration::from_secs(60);

const SEALED: &[u8] = b"dray authorization 1";

impl SharedKey {
    pub(super) fn load(path: &Path) -> Result<Self, String> {
        let keys = Keys::read(path)?;
        Ok(Self { path: path.to_owned(), keys: ArcSwap::from_pointee(keys) })
    }

    /// Reads the file again. An error leaves the keys as they are.
    pub(super) fn reload(&self) -> Result<(), String> {
        let keys = Keys::read(&self.path)?;
        if keys.lines != self.keys.load().lines {
            tracing::info!(file = %self.path.display(), keys = keys.keys.len(), "the peers' key has changed");
            self.keys.store(Arc::new(keys));
        }
        Ok(())
    }

    /// Signs a question to somebody by adding a header.
    pub(super) fn sign(&self, to: SocketAddr, method: &Method, path: &str, headers: &mut HeaderMap) -> Seal {
        let key = self.keys.load().keys[0].clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let mac = hmac::sign(&key, question(now, to, method, path, headers).as_bytes());
        let header = HeaderValue::from_str(&format!("{now} {}", hex(mac.as_ref()))).expect("digits fit a header");
        headers.insert(AUTH, header.clone());
        Seal { key, question: header }
    }

    /// Whether a question to this node, at the address where it was asked, comes from somebody who knows
    /// the key.
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
        let text = question(time, at, method, path, headers);
        let keys = self.keys.load();
        let key = keys.keys.iter().find(|key| hmac::verify(key, text.as_bytes(), &mac).is_ok());
        let key = key.ok_or(PeerAuthError::WrongKey)?.clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if now.abs_diff(Duration::from_millis(time)) > CLOCKS {
            return Err(PeerAuthError::OtherTime);
        }
        Ok(Seal { key, question: header.clone() })
    }
}

impl SharedKey {
    /// Makes a text that only those read who know the key.
    pub(super) fn seal(&self, text: &HeaderValue) -> Option<HeaderValue> {
        let sealed = self.keys.load().sealing.first()?.seal(text.as_bytes())?;
        HeaderValue::from_str(&sealed).ok()
    }

    /// Reads it. None: it was made with another key, or changed.
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
        let sealing = lines.iter().map(|line| Sealing::new(line.as_bytes(), SEALED)).collect::<Option<_>>();
        let sealing = sealing.ok_or_else(|| file.wrong("no key can be made of it"))?;
        Ok(Self { lines, keys, sealing })
    }
}

impl Seal {
    /// Signs the answer by adding a header.
    pub fn sign(&self, status: u16, headers: &HeaderMap) -> (HeaderName, HeaderValue) {
        let mac = hmac::sign(&self.key, answer(&self.question, status, headers).as_bytes());
        (AUTH, HeaderValue::from_str(&hex(mac.as_ref())).expect("digits fit a header"))
    }

    /// Whether an answer comes from somebody who knows the key, and was asked this.
    pub(super) fn proves(&self, status: u16, headers: &HeaderMap) -> bool {
        let mac = headers.get(AUTH).and_then(|value| value.to_str().ok()).and_then(from_hex);
        let text = answer(&self.question, status, headers);
        mac.is_some_and(|mac| hmac::verify(&self.key, text.as_bytes(), &mac).is_ok())
    }
}

impl fmt::Debug for Seal {
    /// Never the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal").field("question", &self.question).finish_non_exhaustive()
    }
}

impl PeerAuthError {
    /// For whoever runs the peer that asked.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotSigned => "peers prove here with a shared key who they are: set peers.key_file",
            Self::WrongKey => {
                "signed with another key than that of peers.key_file here, or for another address than this"
            }
            Self::OtherTime => "signed at a time that is more than a minute from now: compare the clocks",
        }
    }
}

fn question(time: u64, to: SocketAddr, method: &Method, path: &str, headers: &HeaderMap) -> String {
    let (address, port) = (to.ip().to_canonical(), to.port());
    let mut text = format!("dray question\n{time}\n{address} {port}\n{method}\n{path}\n");
    write_headers(&mut text, headers, &[RANGE, CACHE_CONTROL]);
    text
}

fn answer(question: &HeaderValue, status: u16, headers: &HeaderMap) -> String {
    let mut text = format!("dray answer\n{}\n{status}\n", question.to_str().unwrap_or_default());
    let more = [CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, AGE, wire::CONTENT_DIGEST, wire::SOURCE];
    write_headers(&mut text, headers, &more);
    text
}

/// The headers that mean something between peers, in the order of their names.
fn write_headers(text: &mut String, headers: &HeaderMap, more: &[HeaderName]) {
    let means = |name: &HeaderName| (name.as_str().starts_with("dray-") && *name != AUTH) || more.contains(name);
    let mut lines: Vec<String> = headers
        .iter()
        .filter(|(name, _)| means(name))
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

    fn asked() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(wire::REQUEST, "role=global".parse().unwrap());
        headers.insert("accept", "*/*".parse().unwrap());
        headers
    }

    fn asked_one() -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], 5052))
    }

    fn check(key: &SharedKey, path: &str, headers: &HeaderMap) -> Result<Seal, PeerAuthError> {
        key.check(asked_one(), &Method::GET, &path.parse().unwrap(), headers)
    }

    #[test]
    fn who_knows_the_key_is_believed_and_nobody_else() {
        let ours = key("0123456789abcdef-ours\n");
        let mut headers = asked();
        assert_eq!(check(&ours, PATH, &headers).err(), Some(PeerAuthError::NotSigned));
        let seal = ours.sign(asked_one(), &Method::GET, PATH, &mut headers);
        let theirs = check(&ours, PATH, &headers).ok().unwrap();
        assert_eq!(check(&key("0123456789abcdef-other"), PATH, &headers).err(), Some(PeerAuthError::WrongKey));
        assert_eq!(check(&ours, "/v2/b/manifests/1?ns=docker.io", &headers).err(), Some(PeerAuthError::WrongKey));
        assert_eq!(
            ours.check(SocketAddr::from(([192, 0, 2, 2], 5052)), &Method::GET, &PATH.parse().unwrap(), &headers).err(),
            Some(PeerAuthError::WrongKey),
            "to somebody else"
        );
        let mapped = "[::ffff:192.0.2.1]:5052".parse().unwrap();
        assert!(ours.check(mapped, &Method::GET, &PATH.parse().unwrap(), &headers).is_ok(), "the same address");
        assert_eq!(
            ours.check(asked_one(), &Method::HEAD, &PATH.parse().unwrap(), &headers).err(),
            Some(PeerAuthError::WrongKey),
            "another method"
        );
        let mut changed = headers.clone();
        changed.insert(wire::REQUEST, "role=zone".parse().unwrap());
        assert_eq!(check(&ours, PATH, &changed).err(), Some(PeerAuthError::WrongKey));
        changed = headers.clone();
        changed.insert("accept", "text/plain".parse().unwrap());
        changed.insert("x-other", "1".parse().unwrap());
        assert!(check(&ours, PATH, &changed).is_ok(), "these mean nothing between peers");

        let mut answer = HeaderMap::new();
        answer.insert(wire::CONTENT_DIGEST, "sha256:x".parse().unwrap());
        let (name, value) = theirs.sign(200, &answer);
        answer.insert(name, value);
        assert!(seal.proves(200, &answer));
        assert!(!seal.proves(404, &answer));
        answer.insert(wire::CONTENT_DIGEST, "sha256:y".parse().unwrap());
        assert!(!seal.proves(200, &answer));
        assert!(!seal.proves(200, &HeaderMap::new()));
    }

    #[test]
    fn what_is_sealed_is_read_by_those_who_know_the_key() {
        let text = HeaderValue::from_static("Bearer hush");
        let (before, both) = (key("0123456789-before\n"), key("0123456789-after\n0123456789-before\n"));
        let sealed = before.seal(&text).unwrap();
        assert!(!sealed.to_str().unwrap().contains("hush"));
        assert_eq!(both.open(&sealed), Some(text.clone()));
        assert_eq!(before.open(&both.seal(&text).unwrap()), None);
        assert_eq!(["", "AAAA", "Bearer hush"].map(|other| before.open(&other.parse().unwrap())), [const { None }; 3]);
    }

    /// Releases that write other lines do not believe each other.
    #[test]
    fn what_is_signed_stays_the_same() {
        let asked = question(1, asked_one(), &Method::GET, PATH, &asked());
        assert_eq!(asked, format!("dray question\n1\n192.0.2.1 5052\nGET\n{PATH}\ndray-request:role=global\n"));
        let headers = HeaderMap::from_iter([(wire::CONTENT_DIGEST, "sha256:x".parse().unwrap())]);
        let answered = answer(&"1 00".parse().unwrap(), 200, &headers);
        assert_eq!(answered, "dray answer\n1 00\n200\ndocker-content-digest:sha256:x\n");
    }

    #[test]
    fn an_old_question_is_not_believed() {
        let ours = key("0123456789abcdef-ours");
        let mut headers = asked();
        let old = UNIX_EPOCH.elapsed().unwrap().as_millis() - 61_000;
        let old = u64::try_from(old).unwrap();
        let mac =
            hmac::sign(&ours.keys.load().keys[0], question(old, asked_one(), &Method::GET, PATH, &headers).as_bytes());
        headers.insert(AUTH, format!("{old} {}", hex(mac.as_ref())).parse().unwrap());
        assert_eq!(check(&ours, PATH, &headers).err(), Some(PeerAuthError::OtherTime));
    }

    #[test]
    fn a_key_can_be_changed_without_a_gap() {
        let (before, both, after) =
            ("0123456789-before\n", "0123456789-after\n0123456789-before\n", "0123456789-after");
        for (asks, is_asked) in [(before, both), (both, both), (both, after), (after, both)] {
            let mut headers = asked();
            let seal = key(asks).sign(asked_one(), &Method::GET, PATH, &mut headers);
            let theirs = check(&key(is_asked), PATH, &headers).ok().unwrap();
            let (name, value) = theirs.sign(200, &HeaderMap::new());
            assert!(seal.proves(200, &HeaderMap::from_iter([(name, value)])));
        }
    }

    #[test]
    fn a_file_is_read_again_and_nonsense_changes_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789-before").unwrap();
        let key = SharedKey::load(file.path()).unwrap();
        let signed = |key: &SharedKey| {
            let mut headers = asked();
            key.sign(asked_one(), &Method::GET, PATH, &mut headers);
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
    fn odd_macs_are_no_macs() {
        let ours = key("0123456789abcdef-ours");
        for text in ["", "1", "x 00", "1 00", &format!("1 {}", "é".repeat(32)), &format!("1 +{}", "0".repeat(63))] {
            let headers = HeaderMap::from_iter([(AUTH, HeaderValue::from_bytes(text.as_bytes()).unwrap())]);
            let error = check(&ours, PATH, &headers).err();
            assert!(matches!(error, Some(PeerAuthError::NotSigned | PeerAuthError::WrongKey)), "{text}");
        }
    }
}
