//! Authenticated encryption of short texts with a shared secret: AES-256-GCM (RFC 5116) under a key derived by
//! HKDF-SHA256 (RFC 5869).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};

/// Encrypts texts of one kind.
pub struct Sealing {
    key: LessSafeKey,
    /// The kind of text: [`Self::open`] rejects texts of another kind, even with the same secret.
    context: &'static [u8],
    random: SystemRandom,
}

impl Sealing {
    /// None: key derivation failed, which no secret can cause.
    pub fn new(secret: &[u8], context: &'static [u8]) -> Option<Self> {
        let root = Salt::new(HKDF_SHA256, context).extract(secret);
        let key = root.expand(&[b"sealing"], &AES_256_GCM).map(UnboundKey::from).ok()?;
        Some(Self { key: LessSafeKey::new(key), context, random: SystemRandom::new() })
    }

    /// The encrypted text, valid in a header. None: the system provides no random bytes.
    pub fn seal(&self, plain: &[u8]) -> Option<String> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut bytes = plain.to_vec();
        let once = Nonce::assume_unique_for_key(nonce);
        self.key.seal_in_place_append_tag(once, Aad::from(self.context), &mut bytes).ok()?;
        Some(URL_SAFE_NO_PAD.encode([&nonce[..], &bytes].concat()))
    }

    /// The decrypted text. None: made with another secret, of another kind, or changed.
    pub fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_LEN)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let plain = self.key.open_in_place(nonce, Aad::from(self.context), &mut sealed).ok()?;
        Some(plain.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_opens_with_its_secret_and_kind_only() {
        let [own, same, other] =
            ["secret", "secret", "other"].map(|secret| Sealing::new(secret.as_bytes(), b"a").unwrap());
        let sealed = own.seal(b"hush").unwrap();
        assert_eq!(same.open(sealed.as_bytes()).as_deref(), Some(&b"hush"[..]));
        assert_ne!(own.seal(b"hush").unwrap(), sealed, "equal texts are not recognizable");
        assert_eq!(other.open(sealed.as_bytes()), None);
        assert_eq!(Sealing::new(b"secret", b"b").unwrap().open(sealed.as_bytes()), None);
        for at in [0, sealed.len() / 2, sealed.len() - 2] {
            let mut changed = sealed.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert_eq!(own.open(&changed), None, "{at}");
        }
        assert_eq!([&b""[..], b"AAAA", b"Bearer hush"].map(|text| own.open(text)), [const { None }; 3]);
    }
}
