//! Tokens verified before, so that a buyer's every request does not cost a public-key operation (some 100 µs for RS256).
//!
//! Lives and dies with one set of keys: a key that is withdrawn takes its cached tokens along. Keyed by the token's
//! SHA-256, since tokens are secrets and callers choose them. Bounded, and forgetting is harmless.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use sha2::{Digest, Sha256};

use super::Identity;

const SHARDS: usize = 16;
/// 65,536 tokens in all, some 10 MB.
const PER_SHARD: usize = 4096;

type Key = [u8; 32];

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Cache {
    shards: [Mutex<HashMap<Key, Verified>>; SHARDS],
}

#[derive(Debug)]
struct Verified {
    identity: Identity,
    until_ms: i64,
}

impl Cache {
    /// Whose token it is, if that was found out before and the token is still good.
    pub(super) fn get(&self, token: &str, now_ms: i64) -> Option<Identity> {
        let key = key(token);
        let shard = self.shard(&key);
        shard.get(&key).filter(|verified| now_ms < verified.until_ms).map(|verified| verified.identity.clone())
    }

    /// Remembers whose token it is.
    pub(super) fn put(&self, token: &str, identity: &Identity, until_ms: i64, now_ms: i64) {
        let key = key(token);
        let mut shard = self.shard(&key);
        if shard.len() >= PER_SHARD {
            shard.retain(|_, verified| now_ms < verified.until_ms);
        }
        if shard.len() >= PER_SHARD {
            // All in use: start over, rather than keep an order of age that every hit would have to touch.
            shard.clear();
        }
        shard.insert(key, Verified { identity: identity.clone(), until_ms });
    }

    fn shard(&self, key: &Key) -> MutexGuard<'_, HashMap<Key, Verified>> {
        self.shards[usize::from(key[0]) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(token: &str) -> Key {
    Sha256::digest(token).into()
}
