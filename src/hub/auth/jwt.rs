//! JSON Web Tokens (RFC 7519). The crate `jsonwebtoken` reads and validates them; the signatures are checked by the
//! cryptography that TLS uses anyway, so that no second one is in the wheel.
//!
//! One key, one algorithm: which one is used is decided by the settings and never by the token, so neither
//! `alg: none` nor a public key taken for a shared secret gets through.

use std::collections::HashSet;
use std::time::Duration;

use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error as JwtError, ErrorKind as JwtErrorKind};
use jsonwebtoken::signature;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use ring::hmac;
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use serde::Deserialize;

use super::{Denied, Grant, Scope, refused};
use crate::error::Result;
use crate::secret::Secret;
use crate::wire::subscriber::MAX_PATTERNS;
use crate::wire::topic::Pattern;

/// Shortest shared secret taken, in bytes: as long as the hash (RFC 7518 §3.2), since a shorter one can be guessed
/// from a single token.
const MIN_SECRET: usize = 32;

/// What signatures are checked with.
#[derive(Clone, Debug)]
pub enum JwtKey {
    /// HS256: a secret shared with whoever issues tokens.
    Secret(Secret),
    /// RS256: the issuer's public key, as PEM.
    PublicKey(String),
}

/// How JSON Web Tokens are checked.
#[derive(Clone, Debug)]
pub struct JwtSettings {
    /// The key, and with it the algorithm.
    pub key: JwtKey,
    /// What `iss` must say, if given.
    pub issuer: Option<String>,
    /// What `aud` must name, if given. A token that names an audience is refused where none is given.
    pub audience: Option<String>,
    /// By how much the clocks of hub and issuer may differ. Python gives 5 s.
    pub leeway: Duration,
}

#[derive(Deserialize)]
struct Claims {
    sub: Option<String>,
    exp: f64,
    #[serde(default)]
    subscribe: Vec<String>,
    #[serde(default)]
    publish: Vec<String>,
}

pub(super) struct Verifier {
    key: DecodingKey,
    validation: Validation,
    leeway: f64,
}

impl Verifier {
    pub(super) fn new(settings: &JwtSettings) -> Result<Self> {
        // An error means that it is there already.
        PROVIDER.install_default().unwrap_or(());
        let (key, algorithm) = match &settings.key {
            JwtKey::Secret(secret) if secret.expose().len() < MIN_SECRET => {
                return Err(refused(&format!("a secret of at least {MIN_SECRET} bytes")));
            }
            JwtKey::Secret(secret) => (DecodingKey::from_secret(secret.expose().as_bytes()), Algorithm::HS256),
            JwtKey::PublicKey(pem) => {
                let key = DecodingKey::from_rsa_pem(pem.as_bytes())
                    .map_err(|_| refused("an RSA public key in PEM (BEGIN PUBLIC KEY)"))?;
                if pem.contains("PRIVATE KEY") {
                    return Err(refused("the public key: the private one belongs to the issuer alone"));
                }
                (key, Algorithm::RS256)
            }
        };
        let mut validation = Validation::new(algorithm);
        // Times are checked here, by a clock that is an argument.
        (validation.validate_exp, validation.validate_nbf) = (false, false);
        validation.required_spec_claims = HashSet::from(["exp".to_owned()]);
        if let Some(issuer) = &settings.issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        if let Some(audience) = &settings.audience {
            validation.set_audience(&[audience]);
            validation.required_spec_claims.insert("aud".to_owned());
        }
        Ok(Self { key, validation, leeway: settings.leeway.as_secs_f64() })
    }

    pub(super) fn check(&self, token: &str, now: f64) -> Result<Grant, Denied> {
        #[derive(Deserialize)]
        struct All {
            #[serde(flatten)]
            claims: Claims,
            nbf: Option<f64>,
        }
        let All { claims, nbf } = decode::<All>(token, &self.key, &self.validation).map_err(|e| denied(&e))?.claims;
        let leeway = self.leeway;
        if claims.exp + leeway <= now {
            return Err(Denied::Expired);
        }
        if nbf.is_some_and(|from| from > now + leeway) {
            return Err(Denied::Invalid("the token is not valid yet".into()));
        }
        Ok(Grant {
            subject: claims.sub,
            subscribe: Some(scope("subscribe", &claims.subscribe)?),
            publish: Some(scope("publish", &claims.publish)?),
            expires: Some(claims.exp + leeway),
        })
    }
}

fn scope(claim: &str, texts: &[String]) -> Result<Scope, Denied> {
    if texts.len() > MAX_PATTERNS {
        return Err(Denied::Invalid(format!("the claim {claim} names more than {MAX_PATTERNS} patterns")));
    }
    let parsed: Result<Vec<_>, _> = texts.iter().map(|text| Pattern::parse(text)).collect();
    parsed.map(Scope::new).map_err(|error| Denied::Invalid(format!("the claim {claim}: {error}")))
}

/// In our words: those of the crate may quote the token.
fn denied(error: &JwtError) -> Denied {
    let why = match error.kind() {
        JwtErrorKind::InvalidSignature => "the token's signature is not right",
        JwtErrorKind::InvalidAlgorithm | JwtErrorKind::UnsupportedAlgorithm => {
            "the token is signed by another algorithm than the hub's"
        }
        JwtErrorKind::InvalidIssuer => "the token is from another issuer",
        JwtErrorKind::InvalidAudience => "the token is for another audience",
        JwtErrorKind::MissingRequiredClaim(claim) => {
            return Denied::Invalid(format!("the token has no claim {claim}"));
        }
        _ => "no JSON Web Token with the claims exp, sub, subscribe and publish",
    };
    Denied::Invalid(why.into())
}

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(JwtErrorKind::UnsupportedAlgorithm.into()),
    verifier_factory: |algorithm, key| match algorithm {
        Algorithm::HS256 => {
            let key = hmac::Key::new(hmac::HMAC_SHA256, key.try_get_as_bytes()?);
            Ok(Box::new(Hs256(key)))
        }
        Algorithm::RS256 => {
            let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.try_get_as_bytes()?.to_vec());
            Ok(Box::new(Rs256(key)))
        }
        _ => Err(JwtErrorKind::UnsupportedAlgorithm.into()),
    },
    key_utils: KeyUtils::new_unimplemented(), // for sets of keys, which are not used
};

struct Hs256(hmac::Key);

impl signature::Verifier<Vec<u8>> for Hs256 {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        hmac::verify(&self.0, message, signature).map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

struct Rs256(UnparsedPublicKey<Vec<u8>>);

impl signature::Verifier<Vec<u8>> for Rs256 {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        self.0.verify(message, signature).map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for Rs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::RS256
    }
}

#[cfg(test)]
mod tests;
