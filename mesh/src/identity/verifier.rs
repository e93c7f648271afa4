//! Verification, and keeping the keys for it fresh.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use jsonwebtoken::{Algorithm, DecodingKey, crypto, dangerous};
use proto::{BuyerId, Error, Reason, error::Result};
use tokio::{sync::Notify, time::Instant};

use super::{Auth, Claims, Identity, Keys, LEEWAY, Object, PinnedKey, Scopes, cache::Cache, jwks::Source};
use crate::clock::Clock;

/// How often a key set is read again, so that withdrawn keys go.
const REFRESH_EVERY: Duration = Duration::from_secs(300);

/// How soon an unknown key may make us read again: anybody can make one up.
const REFRESH_AT_MOST_EVERY: Duration = Duration::from_secs(10);

/// Longer is not a token but an attack on the parser.
const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// Headers that are remembered of one set of keys. An issuer has one for each of its keys.
const KNOWN_HEADERS: usize = 16;

/// Tells who sent a token. Share it: the keys are read once.
pub struct Verifier {
    current: RwLock<Arc<KeySet>>,
    source: Option<Source>,
    unknown_key: Notify,
    issuer: Option<String>,
    audience: Option<String>,
    clock: Clock,
}

struct KeySet {
    keys: Vec<PinnedKey>,
    /// None for HS256, where verifying costs no more than the lookup.
    cache: Option<Cache>,
    /// Headers of tokens with a good signature, as they were written, and the indices of their keys: an issuer writes
    /// the same few over and over, and reading one costs as much as all the rest. Only good tokens' come in, so that
    /// nobody else can fill it.
    headers: RwLock<Vec<(Box<str>, usize)>>,
    /// What it was read from, to tell whether it changed.
    text: Bytes,
}

impl KeySet {
    fn new(keys: Vec<PinnedKey>, cache: Option<Cache>, text: Bytes) -> Self {
        Self { keys, cache, headers: RwLock::default(), text }
    }

    fn from_jwks(text: Bytes) -> anyhow::Result<Self> {
        Ok(Self::new(super::jwks::pinned_keys(&text)?, Some(Cache::default()), text))
    }

    /// The index of the key by which a good token had this very header.
    fn known(&self, header: &str) -> Option<usize> {
        let known = self.headers.read().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(text, _)| **text == *header).map(|(_, index)| *index)
    }

    fn remember(&self, header: &str, index: usize) {
        // An issuer that writes another header into every token must not cost everybody a lock.
        if self.headers.read().unwrap_or_else(PoisonError::into_inner).len() >= KNOWN_HEADERS {
            return;
        }
        let mut known = self.headers.write().unwrap_or_else(PoisonError::into_inner);
        // Several may have seen it first.
        if known.len() < KNOWN_HEADERS && known.iter().all(|(text, _)| **text != *header) {
            known.push((header.into(), index));
        }
    }

    /// The index of the key that a token's header means. Without a name it can only be the only one.
    fn find(&self, id: Option<&str>) -> Option<usize> {
        match (id, &self.keys[..]) {
            (None, [_]) => Some(0),
            (None, _) => None,
            // A shared secret has no name, whatever the token calls it.
            (Some(_), [PinnedKey { id: None, .. }]) => Some(0),
            (Some(id), keys) => keys.iter().position(|key| key.id.as_deref() == Some(id)),
        }
    }
}

impl Verifier {
    pub(super) async fn load(auth: &Auth, clock: Clock) -> anyhow::Result<Arc<Self>> {
        let (keys, source) = match &auth.keys {
            Keys::Hs256(secret) => {
                let key = DecodingKey::from_secret(secret.as_bytes());
                let keys = vec![PinnedKey { id: None, key, algorithm: Algorithm::HS256 }];
                (KeySet::new(keys, None, Bytes::new()), None)
            }
            Keys::Jwks(source) => (KeySet::from_jwks(source.read().await?)?, Some(source.clone())),
        };
        Ok(Arc::new(Self {
            current: RwLock::new(Arc::new(keys)),
            source,
            unknown_key: Notify::new(),
            issuer: auth.issuer.clone(),
            audience: auth.audience.clone(),
            clock,
        }))
    }

    /// Whose token an `Authorization` header holds. UNAUTHENTICATED, without saying why, for all that is wrong.
    ///
    /// A token by a key that is not known is refused too, but has the keys read again soon ([`Self::keep_fresh`]).
    pub fn verify(&self, authorization: &str) -> Result<Identity> {
        let token = match authorization.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(Error::new(Reason::Unauthenticated, "a bearer token is required")),
        };
        self.verify_token(token)
            .map_err(|why| Error::new(Reason::Unauthenticated, "the token is not valid").with_context(why))
    }

    fn verify_token(&self, token: &str) -> std::result::Result<Identity, String> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err("too long".to_owned());
        }
        let key_set = self.current();
        let now_ms = self.clock.now_ms();
        if let Some(known) = key_set.cache.as_ref().and_then(|cache| cache.get(token, now_ms)) {
            return Ok(known);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or("no signature")?;
        let (header, _) = signed.rsplit_once('.').ok_or("no claims")?;
        let known = key_set.known(header);
        let index = match known {
            Some(index) => index,
            None => self.key_by(token, &key_set)?,
        };
        let key = &key_set.keys[index];
        // The key's algorithm is the only one allowed, whatever the header says.
        match crypto::verify(signature, signed.as_bytes(), &key.key, key.algorithm) {
            Ok(true) => {}
            Ok(false) => return Err("not signed by the key".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
        if known.is_none() {
            key_set.remember(header, index);
        }
        // Not dangerous here: the signature is good, and what it claims is checked below, by our clock and our idea
        // of what must be there.
        let Object(claims) = dangerous::insecure_decode_claims(token).map_err(|e| e.to_string())?;
        let (identity, until_ms) = self.check(&claims, now_ms)?;
        if let Some(cache) = &key_set.cache {
            cache.put(token, &identity, until_ms, now_ms);
        }
        Ok(identity)
    }

    /// The index of the key that a token's header, not seen before, means.
    fn key_by(&self, token: &str, key_set: &KeySet) -> std::result::Result<usize, String> {
        let header = jsonwebtoken::decode_header(token).map_err(|e| e.to_string())?;
        if header.crit.is_some() {
            return Err("it has critical header fields, and we know none".to_owned());
        }
        let Some(index) = key_set.find(header.kid.as_deref()) else {
            self.unknown_key.notify_one();
            return Err(format!("unknown key {:?}", header.kid));
        };
        if header.alg != key_set.keys[index].algorithm {
            return Err(format!("{:?} is not what its key is for", header.alg));
        }
        Ok(index)
    }

    /// What a token with a good signature claims, and until when that holds.
    fn check(&self, claims: &Claims, now_ms: i64) -> std::result::Result<(Identity, i64), String> {
        let until_ms = millis(claims.exp.ok_or("no exp")?).saturating_add(LEEWAY.as_millis() as i64);
        if now_ms >= until_ms {
            return Err("expired".to_owned());
        }
        if claims.nbf.is_some_and(|nbf| now_ms < millis(nbf).saturating_sub(LEEWAY.as_millis() as i64)) {
            return Err("not valid yet".to_owned());
        }
        if self.issuer.is_some() && claims.iss != self.issuer {
            return Err(format!("issuer {:?}", claims.iss));
        }
        if let Some(audience) = &self.audience
            && !claims.aud.iter().flat_map(|aud| aud.iter()).any(|aud| aud == audience)
        {
            return Err("for another audience".to_owned());
        }
        let subject = BuyerId::parse(claims.sub.as_deref().ok_or("no sub")?).map_err(|e| e.to_string())?;
        let words = claims.scope.iter().flat_map(|scope| scope.iter()).flat_map(str::split_whitespace);
        Ok((Identity { subject, scopes: Scopes::read(words) }, until_ms))
    }

    /// Reads the key set again every five minutes, and sooner when a token names an unknown key. Runs until it is
    /// dropped. A set that cannot be read leaves the last one in use: an issuer that is away must not lock buyers out.
    pub async fn keep_fresh(self: Arc<Self>) {
        let Some(source) = &self.source else { return std::future::pending().await };
        loop {
            let read_at = Instant::now();
            tokio::select! {
                biased;
                () = tokio::time::sleep(REFRESH_EVERY) => {}
                () = self.unknown_key.notified() => {
                    tokio::time::sleep_until(read_at + REFRESH_AT_MOST_EVERY).await;
                }
            }
            if let Err(error) = self.refresh(source).await {
                tracing::warn!(error = format!("{error:#}"), "the JWKS could not be read again");
            }
        }
    }

    async fn refresh(&self, source: &Source) -> anyhow::Result<()> {
        let text = source.read().await?;
        if text != self.current().text {
            let keys = Arc::new(KeySet::from_jwks(text)?);
            tracing::info!(keys = keys.keys.len(), "the JWKS has changed");
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = keys;
        }
        Ok(())
    }

    fn current(&self) -> Arc<KeySet> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("source", &self.source).finish_non_exhaustive()
    }
}

/// A NumericDate in milliseconds. Casting saturates, and what is no number becomes 1970.
fn millis(seconds: f64) -> i64 {
    (seconds * 1000.0) as i64
}
