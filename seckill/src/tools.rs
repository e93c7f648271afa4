//! Small verbs: minting tokens, applying migrations.

use std::{path::Path, time::Duration};

use anyhow::{Context, bail};
use mesh::{
    clock::Clock,
    identity::{AuthArgs, Minter, Scopes},
};
use migrations::Service;
use proto::BuyerId;

use crate::{
    backends::open_database,
    config::{MigrateAction, MigrateArgs, TokenArgs},
};

/// Prints a token. Works offline: whoever has the key can mint.
pub fn token(args: &TokenArgs) -> anyhow::Result<bool> {
    let minter = minter(&args.auth, &args.data_dir)?;
    println!("{}", mint(&minter, &args.sub, &args.scope.join(" "), args.ttl)?);
    Ok(true)
}

/// What mints tokens: the key given, or the data dir's.
pub fn minter(auth: &AuthArgs, data_dir: &Path) -> anyhow::Result<Minter> {
    auth.load_or_create(data_dir)?
        .minter(Clock::system())
        .context("tokens of a JWKS are minted by whoever has its keys")
}

/// Mints a token with the scopes named.
pub fn mint(minter: &Minter, sub: &str, scope: &str, ttl: Duration) -> anyhow::Result<String> {
    let mut scopes = Scopes::default();
    for word in scope.split_whitespace() {
        match word {
            "buyer" => scopes.buyer = true,
            "operator" => scopes.operator = true,
            other => bail!("{other:?} is not a scope: buyer or operator"),
        }
    }
    Ok(minter.mint(&BuyerId::parse(sub)?, scopes, ttl)?)
}

/// Applies what is pending, or shows what is applied. False when `status` found something pending.
pub async fn migrate(args: &MigrateArgs) -> anyhow::Result<bool> {
    let mut complete = true;
    for service in Service::ALL {
        let db = open_database(&args.storage, service).await?;
        if args.action == MigrateAction::Up {
            migrations::up(service, &db).await?;
        }
        for (name, applied) in migrations::status(service, &db).await? {
            complete &= applied;
            println!("{:<12} {:<40} {}", service.name(), name, if applied { "applied" } else { "pending" });
        }
    }
    Ok(complete)
}
