//! JSON Web Key Sets: where they come from, and which of their keys we use for what.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
};

use super::PinnedKey;

/// A key set of hundreds of keys fits; more is not one.
const MAX_BYTES: usize = 1 << 20;

const FETCH_LIMIT: Duration = Duration::from_secs(10);

/// Where a key set is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    File(PathBuf),
    Url(http::Uri),
}

impl Source {
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        if !text.contains("://") {
            return Ok(Self::File(text.into()));
        }
        let url: http::Uri = text.parse().with_context(|| format!("{text:?} is not a URL"))?;
        ensure!(matches!(url.scheme_str(), Some("http" | "https")), "{text:?} is neither http nor https");
        Ok(Self::Url(url))
    }

    /// The key set's text, as it is now.
    pub(super) async fn read(&self) -> anyhow::Result<Bytes> {
        match self {
            Self::File(path) => {
                let read = tokio::fs::read(path).await;
                Ok(read.with_context(|| format!("cannot read {}", path.display()))?.into())
            }
            Self::Url(url) => {
                let fetched = tokio::time::timeout(FETCH_LIMIT, fetch(url.clone())).await;
                fetched.context("no answer in time").flatten().with_context(|| format!("cannot fetch {url}"))
            }
        }
    }
}

async fn fetch(url: http::Uri) -> anyhow::Result<Bytes> {
    let https = hyper_rustls::HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
        .context("cannot read the system's certificates")?
        .https_or_http()
        .enable_http1()
        .build();
    // A client for one request: keys are fetched every few minutes, and an idle connection would be gone by then.
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(https);
    let response = client.get(url).await?;
    if !response.status().is_success() {
        bail!("the server answered {}", response.status());
    }
    let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
    Ok(body.map_err(anyhow::Error::from_boxed)?.to_bytes())
}

/// The keys of a set that can verify our tokens. Others, for other purposes, may be in it and are passed over; a set
/// without any is a mistake.
pub(super) fn pinned_keys(text: &[u8]) -> anyhow::Result<Vec<PinnedKey>> {
    #[derive(serde::Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(text).context("not a JWKS")?;
    // One by one: a key of a type that is not known yet must not cost us the rest.
    let keys: Vec<_> = set.keys.into_iter().filter_map(|key| pin(&serde_json::from_value(key).ok()?)).collect();
    ensure!(!keys.is_empty(), "the JWKS has no key for signatures by RS256, ES256 or EdDSA");
    Ok(keys)
}

/// Binds a key to its one algorithm: by what kind of key it is, where it does not say.
fn pin(jwk: &Jwk) -> Option<PinnedKey> {
    if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
        return None;
    }
    let (algorithm, name) = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
        }
        // Shared secrets have no place in a document that is published.
        _ => return None,
    };
    if jwk.common.key_algorithm.is_some_and(|said| said != name) {
        return None;
    }
    let key = DecodingKey::from_jwk(jwk).ok()?;
    Some(PinnedKey { id: jwk.common.key_id.clone(), key, algorithm })
}
