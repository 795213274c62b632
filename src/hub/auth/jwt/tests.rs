use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use serde_json::{Value, json};

use super::*;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const PUBLIC: &str = include_str!("../../../../tests/vectors/jwt_test_key.pub.pem");
const PRIVATE: &str = include_str!("../../../../tests/vectors/jwt_test_key.pem");

fn part(json: &Value) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(json.to_string())
}

fn body(algorithm: &str, claims: &Value) -> String {
    format!("{}.{}", part(&json!({"alg": algorithm, "typ": "JWT"})), part(claims))
}

fn hs256(secret: &str, body: &str) -> String {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), body.as_bytes());
    format!("{body}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag))
}

fn rs256(body: &str) -> String {
    let der: String = PRIVATE.lines().filter(|line| !line.starts_with("---")).collect();
    let key = RsaKeyPair::from_pkcs8(&base64::prelude::BASE64_STANDARD.decode(der).expect("pem")).expect("key");
    let mut tag = vec![0; key.public().modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), body.as_bytes(), &mut tag).expect("signed");
    format!("{body}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag))
}

fn settings(key: JwtKey) -> JwtSettings {
    JwtSettings { key, issuer: None, audience: None, leeway: Duration::from_secs(5) }
}

fn shared() -> JwtKey {
    JwtKey::Secret(Secret::new(SECRET))
}

fn check(settings: &JwtSettings, token: &str) -> Result<Grant, String> {
    Verifier::new(settings).expect("valid").check(token, 1000.0).map_err(|denied| denied.to_string())
}

fn claims() -> Value {
    json!({"sub": "ada", "exp": 1100, "subscribe": ["alert.*"], "publish": ["graph/ada/*"]})
}

fn with(name: &str, value: impl Into<Value>) -> Value {
    let mut claims = claims();
    claims[name] = value.into();
    claims
}

#[test]
fn both_algorithms_yield_what_the_claims_say() {
    let cases = [
        (shared(), hs256(SECRET, &body("HS256", &claims()))),
        (JwtKey::PublicKey(PUBLIC.into()), rs256(&body("RS256", &claims()))),
    ];
    for (key, token) in cases {
        let grant = check(&settings(key), &token).expect("good");
        assert_eq!((grant.subject.as_deref(), grant.expires), (Some("ada"), Some(1105.0)));
        let pattern = |text| Pattern::parse(text).expect("valid");
        assert!(grant.may_subscribe(&pattern("alert.disk")) && !grant.may_subscribe(&pattern("graph/ada/x")));
        assert_eq!(grant.publish, Some(Scope::new([pattern("graph/ada/*")])));
    }
}

#[test]
fn what_a_token_does_not_name_it_does_not_grant() {
    let token = hs256(SECRET, &body("HS256", &json!({"exp": 1100})));
    let grant = check(&settings(shared()), &token).expect("good");
    assert_eq!((grant.subject, grant.subscribe, grant.publish), (None, Some(Scope::new([])), Some(Scope::new([]))));
}

#[test]
fn the_algorithm_is_never_the_tokens_choice() {
    let none = [body("none", &claims()), format!("{}.", body("none", &claims())), hs256("", &body("none", &claims()))];
    // The public key is no secret: taken for one, anybody could sign.
    let confused = hs256(PUBLIC, &body("HS256", &claims()));
    let mislabelled = hs256(PUBLIC, &body("RS256", &claims()));
    let hs384 = hs256(SECRET, &body("HS384", &claims()));
    for token in none.iter().chain([&confused, &mislabelled, &hs384, &hs256("x", &body("HS256", &claims()))]) {
        for key in [shared(), JwtKey::PublicKey(PUBLIC.into())] {
            let denied = check(&settings(key), token).expect_err(token);
            assert!(token.split('.').all(|part| part.is_empty() || !denied.contains(part)), "{denied}");
        }
    }
    assert!(check(&settings(shared()), &rs256(&body("RS256", &claims()))).is_err());
}

#[test]
fn a_token_that_was_changed_is_refused_wherever_it_was() {
    let token = hs256(SECRET, &body("HS256", &claims()));
    for at in 0..token.len() {
        let mut changed = token.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).expect("ascii");
        assert!(check(&settings(shared()), &changed).is_err(), "{at}");
        assert!(check(&settings(shared()), &token[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn times_issuer_and_audience_are_checked() {
    let plain = settings(shared());
    let strict = JwtSettings { issuer: Some("us".into()), audience: Some("hub".into()), ..settings(shared()) };
    let sign = |claims: &Value| hs256(SECRET, &body("HS256", claims));
    let good = json!({"exp": 1100, "iss": "us", "aud": ["other", "hub"]});
    assert!(check(&strict, &sign(&good)).is_ok());
    for (settings, claims, word) in [
        (&plain, with("exp", 995), "expired"),
        (&plain, with("nbf", 1006), "not valid yet"),
        (&plain, with("exp", "1100"), "exp"),
        (&plain, json!({"sub": "ada"}), "exp"),
        (&plain, with("aud", "hub"), "audience"),
        (&plain, with("subscribe", "alert.*"), "subscribe"),
        (&plain, with("publish", vec![""]), "publish"),
        (&plain, with("subscribe", vec!["a"; 257]), "256"),
        (&strict, json!({"exp": 1100, "aud": "hub"}), "iss"),
        (&strict, json!({"exp": 1100, "iss": 7, "aud": "hub"}), "iss"),
        (&strict, json!({"exp": 1100, "iss": "us", "aud": 7}), "aud"),
        (&strict, json!({"exp": 1100, "iss": "them", "aud": "hub"}), "issuer"),
        (&strict, json!({"exp": 1100, "iss": "us", "aud": "other"}), "audience"),
        (&strict, json!({"exp": 1100, "iss": "us"}), "aud"),
    ] {
        let denied = check(settings, &sign(&claims)).expect_err(word);
        assert!(denied.contains(word), "{claims}: {denied}");
    }
    assert!(check(&plain, &sign(&with("exp", 996))).is_ok(), "within the leeway");
    assert!(check(&plain, &sign(&with("nbf", 1004))).is_ok(), "within the leeway");
}

#[test]
fn keys_that_are_none_are_refused_at_the_start_and_not_shown() {
    let short = JwtKey::Secret(Secret::new("s3cret"));
    for key in [short, JwtKey::PublicKey("nonsense".into()), JwtKey::PublicKey(PRIVATE.into())] {
        let error = Verifier::new(&settings(key)).err().expect("refused").to_string();
        assert!(error.contains("auth=(hidden)") && !error.contains("s3cret"), "{error}");
    }
}
