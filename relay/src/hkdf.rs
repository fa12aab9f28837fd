//! The key derivation of TLS_AES_256_GCM_SHA384 (RFC 5869). A session makes two dozen keys of ten secrets. The library's own way
//! hashes the secret anew for each of them; here that is done once for a secret, and SHA-384 is most of what a resumed session costs.

use aws_lc_rs::hmac;
use rustls::crypto::hmac::{Hmac, Key, Tag};
use rustls::crypto::tls13::HkdfUsingHmac;

pub static SHA384: HkdfUsingHmac<'static> = HkdfUsingHmac(&HmacSha384);

struct HmacSha384;

impl Hmac for HmacSha384 {
    fn with_key(&self, key: &[u8]) -> Box<dyn Key> {
        Box::new(Keyed(hmac::Key::new(hmac::HMAC_SHA384, key)))
    }

    fn hash_output_len(&self) -> usize {
        hmac::HMAC_SHA384.tag_len()
    }
}

/// The state of the hash after its key.
struct Keyed(hmac::Key);

impl Key for Keyed {
    fn sign_concat(&self, first: &[u8], middle: &[&[u8]], last: &[u8]) -> Tag {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(first);
        for piece in middle {
            context.update(piece);
        }
        context.update(last);
        Tag::new(context.sign().as_ref())
    }

    fn tag_len(&self) -> usize {
        hmac::HMAC_SHA384.tag_len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_derives_what_the_library_does() {
        use rustls::crypto::tls13::{Hkdf, OkmBlock};
        let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;
        let theirs = suite.tls13().unwrap().hkdf_provider;
        let okm = OkmBlock::new(&[7; 48]);
        let of = |hkdf: &dyn Hkdf| {
            let expanders = [
                hkdf.extract_from_zero_ikm(None),
                hkdf.extract_from_zero_ikm(Some(b"salt")),
                hkdf.extract_from_secret(None, b"secret"),
                hkdf.extract_from_secret(Some(&[3; 200]), &[5; 300]),
                hkdf.expander_for_okm(&okm),
            ];
            let mut derived = vec![hkdf.hmac_sign(&okm, b"message").as_ref().to_vec()];
            for expander in expanders {
                derived.push(expander.expand_block(&[b"tls13 ", b"", b"label"]).as_ref().to_vec());
                for bytes in [12, 32, 48, 100] {
                    let mut keys = vec![0; bytes];
                    expander.expand_slice(&[&[0, 1], b"tls13 key", &[9; 150]], &mut keys).unwrap();
                    derived.push(keys);
                }
            }
            derived
        };
        assert_eq!(of(&SHA384), of(theirs));
    }
}
