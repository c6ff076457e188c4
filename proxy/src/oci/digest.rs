//! Content digests: `sha256:<64 hex>` and `sha512:<128 hex>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sha2::Digest as _;

/// A well-formed digest of an algorithm that dray can verify.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    text: Arc<str>,
    algorithm: Algorithm,
}

/// The registered algorithms of the image specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    Sha256,
    Sha512,
}

/// Why a text is not a valid digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    #[error("not a valid digest: expected sha256:<64 hex> or sha512:<128 hex>, in lower case")]
    Malformed,
    #[error("not a supported digest algorithm: expected sha256 or sha512")]
    UnknownAlgorithm,
}

/// A running hash with the digest that it is compared to.
#[derive(Clone)]
pub struct DigestVerifier {
    hash: Hash,
    expected: Digest,
}

#[derive(Clone)]
enum Hash {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

// === impl Digest ===

impl Digest {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The hex part, fit for a file name.
    pub fn hex(&self) -> &str {
        &self.text[self.algorithm.as_str().len() + 1..]
    }

    /// The sha256 digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_sha256(sha2::Sha256::digest(bytes).as_slice())
    }

    pub fn verifier(&self) -> DigestVerifier {
        let hash = match self.algorithm {
            Algorithm::Sha256 => Hash::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => Hash::Sha512(sha2::Sha512::new()),
        };
        DigestVerifier { hash, expected: self.clone() }
    }

    /// Whether `bytes` as a whole have this digest.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let mut verifier = self.verifier();
        verifier.update(bytes);
        verifier.verified()
    }

    fn from_sha256(raw: &[u8]) -> Self {
        Self { text: format!("sha256:{}", to_hex(raw)).into(), algorithm: Algorithm::Sha256 }
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (name, hex) = text.split_once(':').ok_or(DigestError::Malformed)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(DigestError::UnknownAlgorithm),
        };
        let is_lower_hex = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if hex.len() != algorithm.hex_len() || !is_lower_hex {
            return Err(DigestError::Malformed);
        }
        Ok(Self { text: text.into(), algorithm })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

// === impl Algorithm ===

impl Algorithm {
    pub const ALL: [Self; 2] = [Self::Sha256, Self::Sha512];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

// === impl DigestVerifier ===

impl DigestVerifier {
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.hash {
            Hash::Sha256(hash) => hash.update(bytes),
            Hash::Sha512(hash) => hash.update(bytes),
        }
    }

    /// Whether all bytes so far have the expected digest.
    pub fn verified(self) -> bool {
        let actual = match self.hash {
            Hash::Sha256(hash) => to_hex(hash.finalize().as_slice()),
            Hash::Sha512(hash) => to_hex(hash.finalize().as_slice()),
        };
        actual == self.expected.hex()
    }
}

fn to_hex(raw: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    raw.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)] as char, DIGITS[usize::from(b & 15)] as char]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verifiable_digests_are_parsed() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digest: Digest = empty.parse().unwrap();
        assert!(digest.matches(b""));
        assert!(!digest.matches(b"x"));
        assert_eq!(digest, Digest::of(b""));
        assert_eq!(digest.hex().len(), 64);
        let long = format!("sha512:{}", "a".repeat(128));
        assert_eq!(long.parse::<Digest>().unwrap().algorithm(), Algorithm::Sha512);
    }

    #[test]
    fn other_digests_are_refused() {
        let upper = format!("sha256:{}", "A".repeat(64));
        for (text, error) in [
            ("sha256:baddigeststring", DigestError::Malformed),
            ("sha256", DigestError::Malformed),
            (upper.as_str(), DigestError::Malformed),
            ("md5:d41d8cd98f00b204e9800998ecf8427e", DigestError::UnknownAlgorithm),
            ("sha256:../../etc/passwd", DigestError::Malformed),
        ] {
            assert_eq!(text.parse::<Digest>().unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn sha512_digests_are_verified() {
        use sha2::Digest as _;
        let text = format!("sha512:{}", to_hex(&sha2::Sha512::digest(b"abc")));
        assert!(text.parse::<Digest>().unwrap().matches(b"abc"));
        assert!(!text.parse::<Digest>().unwrap().matches(b"abd"));
    }
}
