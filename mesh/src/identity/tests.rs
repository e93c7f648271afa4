use std::{
    os::unix::fs::PermissionsExt,
    sync::atomic::{AtomicI64, Ordering},
};

use clap::Parser;
use jsonwebtoken::jwk::Jwk;
use serde_json::{Value, json};

use super::*;

const NOW_MS: i64 = 1_800_000_000_000;
const NOW_S: i64 = NOW_MS / 1000;
const MINUTE: Duration = Duration::from_secs(60);

/// Made for these tests and good for nothing else.
const RSA: &[u8] = include_bytes!("testdata/rsa.pem");
const EC: &[u8] = include_bytes!("testdata/ec.pem");
const ED25519: &[u8] = include_bytes!("testdata/ed25519.pem");

fn secret() -> Secret {
    "an HS256 secret of 32 bytes or more".parse().unwrap()
}

/// A verifier and a minter for the same secret, and the hands of their clock.
async fn hs256() -> (Arc<Verifier>, Minter, Arc<AtomicI64>) {
    let (clock, hands) = Clock::manual(NOW_MS);
    let auth = Auth::hs256(secret());
    (auth.verifier(clock.clone()).await.unwrap(), auth.minter(clock).unwrap(), hands)
}

fn alice() -> BuyerId {
    BuyerId::parse("alice").unwrap()
}

fn buyer() -> Scopes {
    "buyer".parse().unwrap()
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// A token with any claims, signed by the verifier's own secret.
fn signed(claims: &Value) -> String {
    jsonwebtoken::encode(&Header::default(), claims, &EncodingKey::from_secret(secret().as_bytes())).unwrap()
}

/// Refused as every bad token is: the same words for all, so that nobody learns what was wrong.
#[track_caller]
fn assert_refused(verifier: &Verifier, token: &str, because: &str) {
    let error = verifier.verify(&bearer(token)).unwrap_err();
    assert_eq!(
        (error.reason, error.message.as_str()),
        (Reason::Unauthenticated, "the token is not valid"),
        "{because}"
    );
}

#[tokio::test]
async fn a_minted_token_is_taken_until_it_expires() {
    let (verifier, minter, hands) = hs256().await;
    let token = minter.mint(&alice(), buyer(), MINUTE).unwrap();
    let identity = verifier.verify(&bearer(&token)).unwrap();
    assert_eq!(identity, Identity { subject: alice(), scopes: buyer() });
    assert_eq!(verifier.verify(&format!("bearer {token}")).unwrap(), identity, "schemes have no case");

    hands.store(NOW_MS + 64_999, Ordering::SeqCst);
    verifier.verify(&bearer(&token)).unwrap();
    hands.store(NOW_MS + 65_000, Ordering::SeqCst);
    assert_refused(&verifier, &token, "expired, leeway and all");
}

#[tokio::test]
async fn e39_a_wrong_scope_is_denied() {
    let (verifier, minter, _) = hs256().await;
    let identity = |scopes| verifier.verify(&bearer(&minter.mint(&alice(), scopes, MINUTE).unwrap())).unwrap();

    let buyer = identity("buyer".parse().unwrap());
    assert_eq!(buyer.require_buyer().unwrap(), &alice());
    assert_eq!(buyer.require_operator().unwrap_err().reason, Reason::PermissionDenied);

    let operator = identity("operator".parse().unwrap());
    operator.require_operator().unwrap();
    assert_eq!(operator.require_buyer().unwrap_err().reason, Reason::PermissionDenied);

    assert_eq!(identity(Scopes::default()).require_buyer().unwrap_err().reason, Reason::PermissionDenied);
}

#[tokio::test]
async fn forged_tokens_are_refused() {
    let (verifier, minter, _) = hs256().await;
    refuses_forged_tokens(&verifier, &minter);
    let token = minter.mint(&alice(), buyer(), MINUTE).unwrap();
    verifier.verify(&bearer(&token)).unwrap();
    // Its header is known from now on, which must open no door.
    refuses_forged_tokens(&verifier, &minter);
}

fn refuses_forged_tokens(verifier: &Verifier, minter: &Minter) {
    let token = minter.mint(&alice(), buyer(), MINUTE).unwrap();
    let [header, claims, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("three parts") };

    let others = Auth::hs256("another secret of thirty-two bytes or more".parse().unwrap());
    let foreign = others.minter(Clock::manual(NOW_MS).0).unwrap().mint(&alice(), buyer(), MINUTE).unwrap();
    assert_refused(verifier, &foreign, "a foreign key");

    let for_bob = minter.mint(&BuyerId::parse("bob").unwrap(), buyer(), MINUTE).unwrap();
    let bobs_claims = for_bob.split('.').nth(1).unwrap();
    assert_refused(verifier, &format!("{header}.{bobs_claims}.{signature}"), "another's claims");

    // {"alg":"none","typ":"JWT"}, in the spellings that have worked elsewhere.
    for none in ["eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0", "eyJhbGciOiJOb25lIn0", "eyJhbGciOiIifQ", "e30"] {
        assert_refused(verifier, &format!("{none}.{claims}."), "no algorithm");
        assert_refused(verifier, &format!("{none}.{claims}.{signature}"), "no algorithm");
    }
    assert_refused(verifier, &format!("{header}.{claims}."), "no signature");
    for junk in ["", ".", "..", "...", "a.b.c", "ä.ö.ü", &"a".repeat(100_000)] {
        assert_refused(verifier, junk, "no token at all");
    }

    // Four parts, the first of them a header that is known once a good token has come: signed, and no token still.
    let four = format!("{header}.e30.{claims}");
    let signed =
        jsonwebtoken::crypto::sign(four.as_bytes(), &EncodingKey::from_secret(secret().as_bytes()), Algorithm::HS256);
    assert_refused(verifier, &format!("{four}.{}", signed.unwrap()), "four parts");

    let hs512 = jsonwebtoken::encode(
        &Header::new(Algorithm::HS512),
        &json!({ "sub": "alice", "exp": NOW_S + 60 }),
        &EncodingKey::from_secret(secret().as_bytes()),
    );
    assert_refused(verifier, &hs512.unwrap(), "the right key by another algorithm");

    let critical = Header { crit: Some(vec!["b64".to_owned()]), ..Header::default() };
    let critical = jsonwebtoken::encode(
        &critical,
        &json!({ "sub": "alice", "exp": NOW_S + 60 }),
        &EncodingKey::from_secret(secret().as_bytes()),
    );
    assert_refused(verifier, &critical.unwrap(), "a critical header that we do not know");
}

#[tokio::test]
async fn claims_must_be_there_and_hold() {
    let (verifier, _, _) = hs256().await;
    let exp = NOW_S + 60;
    verifier.verify(&bearer(&signed(&json!({ "sub": "alice", "exp": exp, "aud": "whoever" })))).unwrap();
    verifier.verify(&bearer(&signed(&json!({ "sub": "alice", "exp": exp, "nbf": NOW_S + 5 })))).unwrap();
    for (bad, because) in [
        (json!({ "exp": exp }), "no sub"),
        (json!({ "sub": "", "exp": exp }), "an empty sub"),
        (json!({ "sub": "a\nb", "exp": exp }), "a sub with a line break"),
        (json!({ "sub": "a".repeat(129), "exp": exp }), "a sub that is too long"),
        (json!({ "sub": 7, "exp": exp }), "a sub of another type"),
        (json!({ "sub": "alice" }), "no exp"),
        (json!({ "sub": "alice", "exp": NOW_S - 5 }), "expired"),
        (json!({ "sub": "alice", "exp": "never" }), "an exp of another type"),
        (json!({ "sub": "alice", "exp": -1e300 }), "an exp before all time"),
        (json!({ "sub": "alice", "exp": exp, "nbf": NOW_S + 6 }), "not valid yet"),
        (json!({ "sub": "alice", "exp": exp, "nbf": 1e300 }), "never valid"),
        (json!({ "sub": "alice", "exp": exp, "scope": 7 }), "a scope of another type"),
        (json!("alice"), "claims of another type"),
    ] {
        assert_refused(&verifier, &signed(&bad), because);
    }
    let listed = json!(["alice", exp, null, null, null, "buyer operator"]);
    assert_refused(&verifier, &signed(&listed), "claims that are no object");
}

#[tokio::test]
async fn scopes_come_as_words_or_as_a_list() {
    let (verifier, _, _) = hs256().await;
    let scopes = |scope: Value| {
        let token = signed(&json!({ "sub": "alice", "exp": NOW_S + 60, "scope": scope }));
        verifier.verify(&bearer(&token)).unwrap().scopes.to_string()
    };
    assert_eq!(scopes(json!("openid buyer")), "buyer");
    assert_eq!(scopes(json!(["operator", "buyer"])), "buyer operator");
    assert_eq!(scopes(json!("buyers Operator")), "");
    assert!("buyer root".parse::<Scopes>().is_err(), "what is typed is meant");
}

#[tokio::test]
async fn what_is_no_bearer_token_is_told_so() {
    let (verifier, minter, _) = hs256().await;
    let token = minter.mint(&alice(), buyer(), MINUTE).unwrap();
    for header in ["", "Bearer", &token, &format!("Basic {token}"), &format!("Bearer{token}")] {
        let error = verifier.verify(header).unwrap_err();
        assert_eq!((error.reason, error.message.as_str()), (Reason::Unauthenticated, "a bearer token is required"));
    }
}

#[tokio::test]
async fn issuer_and_audience_are_checked_where_they_are_configured() {
    let clock = Clock::manual(NOW_MS).0;
    let auth = Auth { issuer: Some("us".into()), audience: Some("seckill".into()), ..Auth::hs256(secret()) };
    let verifier = auth.verifier(clock.clone()).await.unwrap();
    let own = auth.minter(clock).unwrap().mint(&alice(), buyer(), MINUTE).unwrap();
    verifier.verify(&bearer(&own)).unwrap();
    let token = |iss: Value, aud: Value| signed(&json!({ "sub": "alice", "exp": NOW_S + 60, "iss": iss, "aud": aud }));
    verifier.verify(&bearer(&token(json!("us"), json!(["others", "seckill"])))).unwrap();
    assert_refused(&verifier, &token(json!("them"), json!("seckill")), "another issuer");
    assert_refused(&verifier, &token(Value::Null, json!("seckill")), "no issuer");
    assert_refused(&verifier, &token(json!("us"), json!("others")), "another audience");
    assert_refused(&verifier, &token(json!("us"), Value::Null), "no audience");
}

/// The issuer's side: private keys by name, and the set of their public halves.
fn issuer_keys() -> Vec<(&'static str, Algorithm, EncodingKey)> {
    vec![
        ("rsa", Algorithm::RS256, EncodingKey::from_rsa_pem(RSA).unwrap()),
        ("ec", Algorithm::ES256, EncodingKey::from_ec_pem(EC).unwrap()),
        ("ed", Algorithm::EdDSA, EncodingKey::from_ed_pem(ED25519).unwrap()),
    ]
}

fn public(id: &str, algorithm: Algorithm, key: &EncodingKey) -> Jwk {
    let mut jwk = Jwk::from_encoding_key(key, algorithm).unwrap();
    jwk.common.key_id = Some(id.to_owned());
    jwk
}

fn jwks(ids: &[&str]) -> String {
    let all = issuer_keys();
    let chosen = all.iter().filter(|(id, ..)| ids.contains(id));
    let keys: Vec<_> = chosen.map(|(id, algorithm, key)| public(id, *algorithm, key)).collect();
    json!({ "keys": keys }).to_string()
}

fn issue(id: &str, named: Option<&str>) -> String {
    let (_, algorithm, key) = issuer_keys().into_iter().find(|(known, ..)| *known == id).unwrap();
    let header = Header { kid: named.map(str::to_owned), ..Header::new(algorithm) };
    let claims = json!({ "sub": "alice", "exp": NOW_S + 60, "scope": "buyer" });
    jsonwebtoken::encode(&header, &claims, &key).unwrap()
}

async fn jwks_verifier(source: &str) -> (Arc<Verifier>, Arc<AtomicI64>) {
    let (clock, hands) = Clock::manual(NOW_MS);
    let args = AuthArgs { auth_jwks: Some(source.to_owned()), ..Default::default() };
    (args.load().unwrap().verifier(clock).await.unwrap(), hands)
}

#[tokio::test]
async fn keys_of_a_set_verify_by_their_own_algorithm_only() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("jwks.json");
    std::fs::write(&file, jwks(&["rsa", "ec", "ed"])).unwrap();
    let (verifier, hands) = jwks_verifier(file.to_str().unwrap()).await;

    for id in ["rsa", "ec", "ed"] {
        let token = bearer(&issue(id, Some(id)));
        // Twice: the second time from the cache.
        for _ in 0..2 {
            assert_eq!(verifier.verify(&token).unwrap(), Identity { subject: alice(), scopes: buyer() }, "{id}");
        }
    }
    assert_refused(&verifier, &issue("rsa", Some("ec")), "another key's name");
    assert_refused(&verifier, &issue("rsa", None), "no name, and several keys");
    assert_refused(&verifier, &issue("rsa", Some("gone")), "an unknown key");

    // The classic confusion: the public key, which everybody has, as the secret of an HMAC.
    let modulus = serde_json::from_str::<Value>(&jwks(&["rsa"])).unwrap()["keys"][0]["n"].clone();
    for secret in [modulus.as_str().unwrap().as_bytes(), RSA] {
        let header = Header { kid: Some("rsa".to_owned()), ..Header::new(Algorithm::HS256) };
        let claims = json!({ "sub": "alice", "exp": NOW_S + 60, "scope": "operator" });
        let token = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(secret)).unwrap();
        assert_refused(&verifier, &token, "a public key as a secret");
    }

    let token = issue("rsa", Some("rsa"));
    hands.store(NOW_MS + 65_000, Ordering::SeqCst);
    assert_refused(&verifier, &token, "expired, though it is in the cache");
}

#[tokio::test(start_paused = true)]
async fn a_rotated_key_is_found_soon_and_a_withdrawn_one_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("jwks.json");
    std::fs::write(&file, jwks(&["ec"])).unwrap();
    let (verifier, _) = jwks_verifier(file.to_str().unwrap()).await;
    let fresh = tokio::spawn(verifier.clone().keep_fresh());
    let (old, new) = (issue("ec", Some("ec")), issue("ed", Some("ed")));
    verifier.verify(&bearer(&old)).unwrap();

    std::fs::write(&file, jwks(&["ed"])).unwrap();
    assert_refused(&verifier, &new, "not read yet");
    crate::testing::eventually("the new key", async || verifier.verify(&bearer(&new)).ok()).await;
    assert_refused(&verifier, &old, "withdrawn, though it was in the cache");

    // A broken set changes nothing.
    std::fs::write(&file, "{}").unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    verifier.verify(&bearer(&new)).unwrap();
    fresh.abort();
}

#[tokio::test]
async fn a_set_is_fetched_over_http() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    let routes = axum::Router::new().route("/keys", axum::routing::get(|| async { jwks(&["ec"]) }));
    let server = tokio::spawn(async { axum::serve(listener, routes).await });
    let (verifier, _) = jwks_verifier(&url).await;
    verifier.verify(&bearer(&issue("ec", None))).unwrap();

    let missing = AuthArgs { auth_jwks: Some(format!("{url}/missing")), ..Default::default() };
    let error = missing.load().unwrap().verifier(Clock::system()).await.unwrap_err();
    assert!(format!("{error:#}").contains("404"), "{error:#}");
    server.abort();
}

#[test]
fn a_set_is_read_for_what_is_in_it_for_us() {
    let mut set: Value = serde_json::from_str(&jwks(&["rsa", "ec"])).unwrap();
    set["keys"][0]["use"] = json!("enc");
    let others = [json!({ "kty": "oct", "k": "c2VjcmV0" }), json!({ "kty": "new", "x": 1 }), json!(7)];
    set["keys"].as_array_mut().unwrap().extend(others);
    let keys = jwks::pinned_keys(set.to_string().as_bytes()).unwrap();
    assert_eq!(keys.iter().map(|k| k.algorithm).collect::<Vec<_>>(), [Algorithm::ES256]);

    // A key that says what it is for is not used for something else.
    set["keys"][1]["alg"] = json!("RS256");
    assert!(jwks::pinned_keys(set.to_string().as_bytes()).is_err());
    assert!(jwks::pinned_keys(b"<html>").is_err());
}

#[derive(clap::Parser)]
struct Program {
    #[command(flatten)]
    auth: AuthArgs,
}

#[test]
fn options_say_what_is_wrong_with_them_and_keep_the_secret() {
    let error =
        |args: &[&str]| Program::try_parse_from([&["program"], args].concat()).map(drop).unwrap_err().to_string();
    assert!(error(&["--auth-hs256-secret", "short"]).contains("at least 32 bytes"));
    let both = error(&["--auth-hs256-secret", &"s".repeat(32), "--auth-jwks", "keys.json"]);
    assert!(both.contains("cannot be used with"), "{both}");
    let given = Program::parse_from(["program", "--auth-hs256-secret", &"s".repeat(32)]).auth;
    assert!(!format!("{given:?}").contains("sss"));
    assert!(given.load().is_ok());

    let error = AuthArgs::default().load().unwrap_err().to_string();
    assert!(error.contains("--auth-hs256-secret"), "{error}");
}

#[tokio::test]
async fn the_data_dirs_key_is_made_once_and_for_us_alone() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let (clock, _) = Clock::manual(NOW_MS);
    let args = AuthArgs::default();
    let made: Vec<_> = std::thread::scope(|scope| {
        let makers: Vec<_> = (0..8).map(|_| scope.spawn(|| args.load_or_create(&data_dir).unwrap())).collect();
        makers.into_iter().map(|maker| maker.join().unwrap()).collect()
    });
    let token = made[0].minter(clock.clone()).unwrap().mint(&alice(), buyer(), MINUTE).unwrap();
    for auth in &made {
        auth.verifier(clock.clone()).await.unwrap().verify(&bearer(&token)).unwrap();
    }
    let file = data_dir.join(KEY_FILE);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(&data_dir).unwrap().count(), 1, "no drafts are left");

    // The file's text is what SECKILL_AUTH_HS256_SECRET would be.
    let text = std::fs::read_to_string(&file).unwrap();
    let named = AuthArgs { auth_hs256_secret: Some(text.trim().parse().unwrap()), ..Default::default() };
    named.load().unwrap().verifier(clock).await.unwrap().verify(&bearer(&token)).unwrap();

    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = format!("{:#}", args.load_or_create(&data_dir).unwrap_err());
    assert!(error.contains("chmod 600"), "{error}");
}
