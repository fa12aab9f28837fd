//! The relay's identity: one Ed25519 key pair, made at start, whose private half never leaves this process; and the TLS 1.3
//! configuration that proves it to a pinned peer with raw public keys (RFC 7250) instead of certificates.

use std::fmt;
use std::sync::{Arc, RwLock};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs as provider, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, CipherSuite, CipherSuiteCommon, ClientConfig, DigitallySignedStruct, DistinguishedName,
    Error, PeerIncompatible, ServerConfig, SignatureScheme, SupportedCipherSuite, Tls13CipherSuite,
};
use serde::{Deserialize, Serialize};

use crate::hkdf;

/// What makes a SubjectPublicKeyInfo of the 32 bytes of an Ed25519 key (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
pub const SPKI_BYTES: usize = SPKI_PREFIX.len() + 32;

/// Both sides must ask for it: another protocol on the same port ends in the handshake.
const ALPN: &[u8] = b"s2ds/1";

/// The PIN: 32 bytes, written as base64url without padding.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    pub fn spki(&self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.0].concat()
    }

    /// The key in what a raw-public-key handshake carries instead of a certificate; None for any other kind of key.
    pub fn from_spki(spki: &[u8]) -> Option<PublicKey> {
        spki.strip_prefix(&SPKI_PREFIX)?.try_into().ok().map(PublicKey)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        URL_SAFE_NO_PAD.decode(&text).ok().and_then(|bytes| bytes.try_into().ok()).map(PublicKey).ok_or_else(
            || serde::de::Error::custom(format!("'{text}' is not a public key: 43 characters of base64url")),
        )
    }
}

/// How a relay's sessions choose and treat their cipher.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ciphers {
    /// ChaCha20-Poly1305 before AES-GCM.
    pub chacha_first: bool,
    /// Of a cipher that needs a new key after so many records, how many at most; 0 is the cipher's own limit.
    pub records_per_key: u64,
    /// Nothing is encrypted but the handshake and the preamble (mode `auth`): what is recorded of it holds no secret for later,
    /// so neither the exchange nor the cipher has to last, and the cheapest will do.
    pub handshake_only: bool,
}

impl Ciphers {
    fn provider(self) -> CryptoProvider {
        let mut crypto = provider::default_provider();
        let chacha =
            |suite: &SupportedCipherSuite| suite.suite() == CipherSuite::TLS13_CHACHA20_POLY1305_SHA256;
        // Stable: among themselves they keep the library's order.
        crypto.cipher_suites.sort_by_key(|suite| chacha(suite) != self.chacha_first);
        if self.handshake_only {
            crypto.kx_groups = vec![provider::kx_group::X25519];
            crypto.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        }
        for suite in &mut crypto.cipher_suites {
            *suite = ours(*suite, self.records_per_key);
        }
        crypto
    }
}

/// The same suite with our derivation of its keys, and a lower limit of `records` unless that is 0; one without a limit has none.
/// Once in a process's life, so what is leaked is bounded.
fn ours(suite: SupportedCipherSuite, records: u64) -> SupportedCipherSuite {
    let SupportedCipherSuite::Tls13(theirs) = suite;
    let limit = theirs.common.confidentiality_limit;
    SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
        common: CipherSuiteCommon {
            suite: theirs.common.suite,
            hash_provider: theirs.common.hash_provider,
            confidentiality_limit: if records > 0 && limit < u64::MAX { records.min(limit) } else { limit },
        },
        hkdf_provider: match theirs.common.suite {
            CipherSuite::TLS13_AES_256_GCM_SHA384 => &hkdf::SHA384,
            _ => theirs.hkdf_provider,
        },
        aead_alg: theirs.aead_alg,
        quic: None,
    })))
}

/// The key pair, ready for both ends of a handshake.
pub struct Identity {
    pub public: PublicKey,
    certified: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
    ciphers: Ciphers,
}

impl Identity {
    /// Makes a fresh pair. Fails only if the system has no randomness.
    pub fn generate(ciphers: Ciphers) -> Result<Identity, Error> {
        let random = || Error::FailedToGetRandomBytes;
        let pkcs8 =
            Ed25519KeyPair::generate_pkcs8(&aws_lc_rs::rand::SystemRandom::new()).map_err(|_| random())?;
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).map_err(|_| random())?;
        let public = PublicKey(pair.public_key().as_ref().try_into().map_err(|_| random())?);
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pkcs8.as_ref().to_vec()));
        let signer = provider::sign::any_eddsa_type(&match private {
            PrivateKeyDer::Pkcs8(key) => key,
            _ => return Err(random()),
        })?;
        let certified = Arc::new(CertifiedKey::new(vec![CertificateDer::from(public.spki())], signer));
        Ok(Identity { public, certified, provider: Arc::new(ciphers.provider()), ciphers })
    }

    /// For a PROD relay: admits whoever proves a key that is in `admitted` at that moment.
    pub fn server(&self, admitted: Arc<RwLock<Vec<PublicKey>>>) -> Result<Arc<ServerConfig>, Error> {
        let verifier =
            Arc::new(Pinned { admitted, algorithms: self.provider.signature_verification_algorithms });
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(self.certified.clone())));
        // Only for who asks, and in its turn (resumption.rs): one that comes later could reach the clear text of mode auth.
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        // ChaCha20-Poly1305 only if both ends want it first: for one that encrypts by itself, AES-GCM is faster.
        config.ignore_client_order = !self.ciphers.chacha_first;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// For a CONS relay: accepts exactly the relay that proves `pin`.
    pub fn client(&self, pin: PublicKey) -> Result<Arc<ClientConfig>, Error> {
        self.clients(pin).map(|(anew, _)| Arc::new(anew))
    }

    /// The same, and one that resumes its sessions: its key exchange is X25519 alone. In mode `tls` it may do nothing else: what is
    /// recorded of a resumed session stays secret if either that or the secret of the session before it does, and so on back to the
    /// whole handshake, which had ML-KEM.
    pub fn clients(&self, pin: PublicKey) -> Result<(ClientConfig, ClientConfig), Error> {
        let verifier = Arc::new(Pinned {
            admitted: Arc::new(RwLock::new(vec![pin])),
            algorithms: self.provider.signature_verification_algorithms,
        });
        let proof = Arc::new(AlwaysResolvesClientRawPublicKeys::new(self.certified.clone()));
        let with = |provider: Arc<CryptoProvider>| -> Result<ClientConfig, Error> {
            let mut config = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .dangerous()
                .with_custom_certificate_verifier(verifier.clone())
                .with_client_cert_resolver(proof.clone());
            config.resumption = Resumption::disabled();
            config.enable_sni = false;
            config.enable_secret_extraction = true;
            config.alpn_protocols = vec![ALPN.to_vec()];
            Ok(config)
        };
        let short =
            CryptoProvider { kx_groups: vec![provider::kx_group::X25519], ..(*self.provider).clone() };
        Ok((with(self.provider.clone())?, with(Arc::new(short))?))
    }
}

/// Verifies a raw public key by comparison with the pins, and the handshake's signature with that key. "dangerous" in rustls'
/// naming means only that this is not certificate validation.
#[derive(Debug)]
struct Pinned {
    admitted: Arc<RwLock<Vec<PublicKey>>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn check(&self, spki: &CertificateDer<'_>) -> Result<(), Error> {
        let admitted = self.admitted.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        match PublicKey::from_spki(spki) {
            Some(key) if admitted.contains(&key) => Ok(()),
            _ => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature_with_raw_key(
            message,
            &SubjectPublicKeyInfoDer::from(key.as_ref()),
            signed,
            &self.algorithms,
        )
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(ciphers: Ciphers) -> Vec<(CipherSuite, u64)> {
        let suites = ciphers.provider().cipher_suites;
        let limit = |suite: &SupportedCipherSuite| suite.tls13().unwrap().common.confidentiality_limit;
        suites
            .iter()
            .filter(|suite| suite.tls13().is_some())
            .map(|suite| (suite.suite(), limit(suite)))
            .collect()
    }

    #[test]
    fn a_kernel_that_takes_no_new_keys_wants_the_cipher_that_needs_none_first() {
        let first = |chacha_first| limits(Ciphers { chacha_first, ..Ciphers::default() })[0];
        assert_eq!(first(true), (CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, u64::MAX));
        assert_eq!(first(false), (CipherSuite::TLS13_AES_256_GCM_SHA384, 1 << 24));
    }

    #[test]
    fn only_what_keeps_nothing_secret_is_exchanged_without_ml_kem() {
        let groups = |handshake_only| {
            let provider = Ciphers { handshake_only, ..Ciphers::default() }.provider();
            provider.kx_groups.iter().map(|group| group.name()).collect::<Vec<_>>()
        };
        assert_eq!(groups(true), [rustls::NamedGroup::X25519]);
        assert_eq!(groups(false)[0], rustls::NamedGroup::X25519MLKEM768);
    }

    #[test]
    fn the_limit_of_records_can_only_be_lowered_and_only_where_there_is_one() {
        for (records_per_key, aes) in [(0, 1 << 24), (1024, 1024), (u64::MAX, 1 << 24)] {
            for (suite, limit) in limits(Ciphers { records_per_key, ..Ciphers::default() }) {
                let chacha = suite == CipherSuite::TLS13_CHACHA20_POLY1305_SHA256;
                assert_eq!(limit, if chacha { u64::MAX } else { aes }, "{suite:?}");
            }
        }
    }
}
