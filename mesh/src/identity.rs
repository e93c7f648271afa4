//! Who is calling: JWTs verified against keys that the operator named, and nothing the token says about itself.
//!
//! A key is bound to one algorithm when it is loaded; a token that names another is refused, so neither `none` nor a
//! public key used as an HMAC secret gets through. `exp` and `sub` must be there, `nbf`, issuer and audience are
//! checked where they apply. Whatever is wrong, the caller hears UNAUTHENTICATED and no more; the log's context says
//! what. Time comes from [`Clock`], never from the verifying library.

use std::{fmt, marker::PhantomData, path::Path, str::FromStr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header};
use proto::{BuyerId, Error, Reason, error::Result};
use serde::{
    Deserialize, Serialize,
    de::{
        Deserializer, MapAccess, SeqAccess, Visitor,
        value::{MapAccessDeserializer, SeqAccessDeserializer},
    },
};

use crate::clock::Clock;

mod cache;
mod jwks;
mod secret;
mod verifier;

pub use secret::Secret;
pub use verifier::Verifier;

use self::jwks::Source;

/// How far the issuer's clock and ours may disagree. Small: an expired token is to be expired.
pub const LEEWAY: Duration = Duration::from_secs(5);

/// The file in the data dir that holds the embedded mode's own key.
const KEY_FILE: &str = "auth-hs256.key";

/// What the gateway is told about tokens.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Identity")]
pub struct AuthArgs {
    /// The secret that tokens are signed with (HS256), at least 32 bytes
    #[arg(
        long,
        env = "SECKILL_AUTH_HS256_SECRET",
        hide_env_values = true,
        value_name = "SECRET",
        conflicts_with = "auth_jwks"
    )]
    pub auth_hs256_secret: Option<Secret>,

    /// A JWKS, as a file or an http(s) URL, with the keys that tokens are signed with (RS256, ES256, EdDSA)
    #[arg(long, env = "SECKILL_AUTH_JWKS", value_name = "FILE|URL")]
    pub auth_jwks: Option<String>,

    /// Accept only tokens of this issuer (`iss`)
    #[arg(long, env = "SECKILL_AUTH_ISSUER", value_name = "ISSUER")]
    pub auth_issuer: Option<String>,

    /// Accept only tokens for this audience (`aud`)
    #[arg(long, env = "SECKILL_AUTH_AUDIENCE", value_name = "AUDIENCE")]
    pub auth_audience: Option<String>,
}

impl AuthArgs {
    /// The configured keys; where there are none, the data dir's own, made on first use. For embedded backends.
    pub fn load_or_create(&self, data_dir: &Path) -> anyhow::Result<Auth> {
        if let Some(keys) = self.keys()? {
            return Ok(self.auth(keys));
        }
        let file = data_dir.join(KEY_FILE);
        let secret = secret::load_or_create(&file).with_context(|| format!("cannot use {}", file.display()))?;
        Ok(self.auth(Keys::Hs256(secret)))
    }

    /// The configured keys, without which there is no start. For real backends.
    pub fn load(&self) -> anyhow::Result<Auth> {
        match self.keys()? {
            Some(keys) => Ok(self.auth(keys)),
            None => bail!(
                "no key to verify tokens with: give --auth-hs256-secret (SECKILL_AUTH_HS256_SECRET) or --auth-jwks \
                 (SECKILL_AUTH_JWKS)"
            ),
        }
    }

    fn keys(&self) -> anyhow::Result<Option<Keys>> {
        match (&self.auth_hs256_secret, self.auth_jwks.as_deref()) {
            (Some(_), Some(_)) => bail!("--auth-hs256-secret and --auth-jwks exclude each other"),
            (Some(secret), None) => Ok(Some(Keys::Hs256(secret.clone()))),
            (None, Some("")) => bail!("--auth-jwks must name a file or a URL"),
            (None, Some(jwks)) => Ok(Some(Keys::Jwks(Source::parse(jwks)?))),
            (None, None) => Ok(None),
        }
    }

    fn auth(&self, keys: Keys) -> Auth {
        Auth { keys, issuer: self.auth_issuer.clone(), audience: self.auth_audience.clone() }
    }
}

/// Where verification starts from: the keys, and whose tokens for whom.
#[derive(Clone, Debug)]
pub struct Auth {
    keys: Keys,
    issuer: Option<String>,
    audience: Option<String>,
}

#[derive(Clone, Debug)]
enum Keys {
    Hs256(Secret),
    Jwks(Source),
}

impl Auth {
    /// Verifies with this secret, whoever the issuer. For tests and tools.
    pub fn hs256(secret: Secret) -> Self {
        Self { keys: Keys::Hs256(secret), issuer: None, audience: None }
    }

    /// A verifier. Loads the JWKS where there is one, and fails when that cannot be had: without keys every buyer
    /// would be turned away. Run [`Verifier::keep_fresh`] beside it.
    pub async fn verifier(&self, clock: Clock) -> anyhow::Result<Arc<Verifier>> {
        Verifier::load(self, clock).await
    }

    /// Makes tokens that the verifier takes; `None` where the key to do so is somebody else's.
    pub fn minter(&self, clock: Clock) -> Option<Minter> {
        match &self.keys {
            Keys::Hs256(secret) => Some(Minter {
                key: EncodingKey::from_secret(secret.as_bytes()),
                issuer: self.issuer.clone(),
                audience: self.audience.clone(),
                clock,
            }),
            Keys::Jwks(_) => None,
        }
    }
}

/// What a caller may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes {
    /// Place and pay orders of its own.
    pub buyer: bool,
    /// Run sales, see and mend everything.
    pub operator: bool,
}

impl Scopes {
    /// Reads scope words. Those of other systems mean nothing here.
    fn read<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        let mut scopes = Self::default();
        for word in words {
            match word {
                "buyer" => scopes.buyer = true,
                "operator" => scopes.operator = true,
                _ => {}
            }
        }
        scopes
    }
}

impl FromStr for Scopes {
    type Err = String;

    /// Reads what somebody typed, where an unknown word is a mistake.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_whitespace().find(|word| !matches!(*word, "buyer" | "operator")) {
            Some(word) => Err(format!("{word:?} is neither buyer nor operator")),
            None => Ok(Self::read(text.split_whitespace())),
        }
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.buyer, self.operator) {
            (true, true) => "buyer operator",
            (true, false) => "buyer",
            (false, true) => "operator",
            (false, false) => "",
        })
    }
}

/// A caller whose token was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The token's subject.
    pub subject: BuyerId,
    /// What it may do.
    pub scopes: Scopes,
}

impl Identity {
    /// The buyer, where it may act as one.
    pub fn require_buyer(&self) -> Result<&BuyerId> {
        if self.scopes.buyer { Ok(&self.subject) } else { Err(Self::lacks("buyer")) }
    }

    /// Fine, where it may act as an operator.
    pub fn require_operator(&self) -> Result<()> {
        if self.scopes.operator { Ok(()) } else { Err(Self::lacks("operator")) }
    }

    fn lacks(scope: &str) -> Error {
        Error::new(Reason::PermissionDenied, format!("the token does not have the scope {scope:?}"))
    }
}

/// Makes HS256 tokens: for `seckill token`, the demo and tests.
#[derive(Clone)]
pub struct Minter {
    key: EncodingKey,
    issuer: Option<String>,
    audience: Option<String>,
    clock: Clock,
}

impl Minter {
    /// A token for this subject, good from now on for `ttl`.
    pub fn mint(&self, subject: &BuyerId, scopes: Scopes, ttl: Duration) -> Result<String> {
        let now_s = self.clock.now_ms() / 1000;
        let claims = Minted {
            sub: subject.as_str(),
            scope: scopes.to_string(),
            iat: now_s,
            exp: now_s.saturating_add(i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX)),
            iss: self.issuer.as_deref(),
            aud: self.audience.as_deref(),
        };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.key).map_err(Error::internal)
    }
}

impl fmt::Debug for Minter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Minter")
    }
}

#[derive(Serialize)]
struct Minted<'a> {
    sub: &'a str,
    scope: String,
    iat: i64,
    exp: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    aud: Option<&'a str>,
}

/// What is read of a token. Everything optional: what must be there is decided in one place, and not by serde.
#[derive(Deserialize)]
struct Claims {
    sub: Option<String>,
    exp: Option<f64>,
    nbf: Option<f64>,
    iss: Option<String>,
    aud: Option<OneOrMany>,
    scope: Option<OneOrMany>,
}

/// What must be written as an object: a list of the same values in order would do for a derived reader.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> std::result::Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }

        deserializer.deserialize_map(Fields(PhantomData))
    }
}

enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    /// By what comes, and not by trying one after the other: this is on every request's way.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of texts")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<OneOrMany, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, texts: A) -> std::result::Result<OneOrMany, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(texts)).map(OneOrMany::Many)
            }
        }

        deserializer.deserialize_any(Texts)
    }
}

impl OneOrMany {
    fn iter(&self) -> impl Iterator<Item = &str> {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
        .iter()
        .map(String::as_str)
    }
}

/// A key and the one algorithm that it is good for.
struct PinnedKey {
    id: Option<String>,
    key: DecodingKey,
    algorithm: Algorithm,
}

#[cfg(test)]
mod tests;
