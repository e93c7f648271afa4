//! Permits in Redis: one hash slot and one EVALSHA per sale and batch. The scripts in `lua/` are the functions of
//! [`crate::domain::permits`]; a server that does not answer in time is an error, never a "sold out".
//!
//! Keys, all tagged `{sale}`: `:permits` (the header), `:grants`, `:done`, `:buyers`, `:pending`. None expires by itself:
//! the server needs `maxmemory-policy noeviction`, and the guard drops those of sales that are over.

use std::time::Duration;

use async_trait::async_trait;
use fred::{
    clients::Client,
    interfaces::{ClientLike, KeysInterface, LuaInterface},
    types::{
        Builder, FromValue, InfoKind,
        config::{Config, ReconnectPolicy},
    },
};
use proto::{
    BuyerId, SaleId,
    error::{Error, Result},
};

use super::{AcquiredBatch, Permits, RefundedBatch};
use crate::domain::{
    HoldId,
    permits::{
        Acquire, Acquired, Claimed, Facts, Grant, Header, Held, Opening, Pending, Phase, Raise, Refund, Refunded,
        Withdrawn,
    },
    sale::Verb,
};

/// A server this slow is as good as away, and buyers are better told to come back.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Items in one script call: a script holds up every other client of the server while it runs, here about 1 ms.
const CHUNK: usize = 500;

/// Once started a client tries for ever to reconnect, this often at least.
const MAX_RECONNECT_DELAY_MS: u32 = 500;

struct Script {
    text: &'static str,
    sha: String,
}

macro_rules! scripts {
    ($($name:ident),* $(,)?) => {
        struct Scripts { $($name: Script),* }

        impl Scripts {
            async fn load(client: &Client) -> Result<Self> {
                Ok(Self { $($name: {
                    let text = concat!(include_str!("lua/prelude.lua"), include_str!(concat!("lua/", stringify!($name), ".lua")));
                    Script { text, sha: client.script_load(text).await.map_err(fault)? }
                }),* })
            }
        }
    };
}

scripts!(acquire, refund, persisted, lookup, header, claim, load, open, clamp, raise, withdraw, facts, pending, buyers);

/// See the module.
pub struct Redis {
    client: Client,
    scripts: Scripts,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Redis")
    }
}

impl Redis {
    /// Connects, e.g. to `redis://127.0.0.1:6379`. Later losses of the connection are repaired by the client.
    pub async fn connect(url: &str) -> Result<Self> {
        let mut builder = Builder::from_config(Config::from_url(url).map_err(fault)?);
        builder.with_performance_config(|config| config.default_command_timeout = TIMEOUT);
        builder.with_connection_config(|config| {
            config.connection_timeout = TIMEOUT;
            config.internal_command_timeout = TIMEOUT;
        });
        builder.set_policy(ReconnectPolicy::new_exponential(0, 10, MAX_RECONNECT_DELAY_MS, 2));
        let client = builder.build().map_err(fault)?;
        client.init().await.map_err(fault)?;
        let scripts = Scripts::load(&client).await?;
        Ok(Self { client, scripts })
    }

    async fn call<R: FromValue>(&self, script: &Script, sale: &SaleId, args: Vec<String>) -> Result<R> {
        match self.client.evalsha(script.sha.clone(), keys(sale), args.clone()).await {
            // A server that was restarted or replaced has not seen the script.
            Err(error) if error.details().starts_with("NOSCRIPT") => {
                self.client.eval(script.text, keys(sale), args).await.map_err(fault)
            }
            result => result.map_err(fault),
        }
    }
}

/// All that is kept of a sale.
fn keys(sale: &SaleId) -> Vec<String> {
    ["permits", "grants", "done", "buyers", "pending"].map(|key| format!("{{{sale}}}:{key}")).to_vec()
}

fn fault(error: fred::error::Error) -> Error {
    Error::dependency("the permit store", error)
}

fn garbled(what: &str) -> Error {
    Error::internal(format!("the permit store answered a garbled {what}"))
}

fn int(text: &str) -> Result<i64> {
    text.parse().map_err(|_| garbled("number"))
}

fn hold(text: &str) -> Result<HoldId> {
    text.parse().map_err(|_| garbled("hold"))
}

fn verb_letter(verb: Verb) -> &'static str {
    match verb {
        Verb::Open => "O",
        Verb::Paused => "P",
        Verb::Closed => "C",
    }
}

fn facts_args(facts: &Facts) -> [String; 7] {
    let Facts { version, verb, start_at, end_at, limit, total, sold } = facts;
    let verb = verb_letter(*verb).to_owned();
    [
        version.to_string(),
        verb,
        start_at.to_string(),
        end_at.to_string(),
        limit.to_string(),
        total.to_string(),
        sold.to_string(),
    ]
}

/// `epoch|quantity|at|buyer`: the buyer last, since it may contain anything.
fn parse_grant(text: &str) -> Result<Grant> {
    let mut parts = text.splitn(4, '|');
    let mut next = || parts.next().ok_or_else(|| garbled("grant"));
    let (epoch, quantity, at) = (int(next()?)?, int(next()?)?, int(next()?)?);
    Ok(Grant { epoch, quantity, at, buyer: BuyerId::parse(next()?)? })
}

fn parse_acquired(text: &str) -> Result<Acquired> {
    let (code, rest) = text.split_at_checked(1).ok_or_else(|| garbled("answer"))?;
    Ok(match code {
        "U" => Acquired::Unavailable,
        "F" => Acquired::Fresh(parse_grant(rest)?),
        "G" => Acquired::Again(parse_grant(rest)?),
        "X" => Acquired::Reused,
        "D" => Acquired::Released,
        "S" => Acquired::NotStarted,
        "P" => Acquired::Paused,
        "E" => Acquired::Ended,
        "L" => Acquired::AtLimit(if rest.is_empty() { None } else { Some(hold(rest)?) }),
        "O" => Acquired::OverLimit,
        "A" => Acquired::AllHeld,
        "Z" => Acquired::SoldOut,
        _ => return Err(garbled("answer")),
    })
}

fn parse_header(fields: &[String]) -> Result<Header> {
    let [epoch, phase, free, granted, snapshot_seq, version, server, facts, verb, start, stop, limit, total, sold] =
        fields
    else {
        return Err(garbled("header"));
    };
    Ok(Header {
        epoch: int(epoch)?,
        phase: if phase == "O" { Phase::Open } else { Phase::Rebuilding },
        free: int(free)?,
        granted: int(granted)?,
        snapshot_seq: int(snapshot_seq)?,
        version: int(version)?,
        server: server.clone(),
        facts: Facts {
            version: int(facts)?,
            verb: match verb.as_str() {
                "O" => Verb::Open,
                "P" => Verb::Paused,
                "C" => Verb::Closed,
                _ => return Err(garbled("verb")),
            },
            start_at: int(start)?,
            end_at: int(stop)?,
            limit: int(limit)?,
            total: int(total)?,
            sold: int(sold)?,
        },
    })
}

fn refund_args(refund: &Refund) -> [String; 6] {
    match refund {
        Refund::Release(release) => [
            "r".to_owned(),
            release.hold.to_string(),
            release.buyer.as_ref().map(|b| b.as_str().to_owned()).unwrap_or_default(),
            release.quantity.to_string(),
            release.seq.to_string(),
            release.grant_epoch.to_string(),
        ],
        Refund::Return(returned) => [
            "p".to_owned(),
            returned.hold.to_string(),
            String::new(),
            String::new(),
            String::new(),
            returned.epoch.to_string(),
        ],
    }
}

#[async_trait]
impl Permits for Redis {
    async fn acquire(&self, sale: &SaleId, now: i64, wishes: Vec<Acquire>) -> Result<AcquiredBatch> {
        let mut batch = AcquiredBatch { results: Vec::with_capacity(wishes.len()), free: 0 };
        for chunk in wishes.chunks(CHUNK) {
            let mut args = Vec::with_capacity(1 + chunk.len() * 3);
            args.push(now.to_string());
            for wish in chunk {
                args.extend([wish.hold.to_string(), wish.buyer.as_str().to_owned(), wish.quantity.to_string()]);
            }
            let answer: Vec<String> = self.call(&self.scripts.acquire, sale, args).await?;
            let (free, results) = answer.split_first().ok_or_else(|| garbled("answer"))?;
            batch.free = int(free)?;
            for result in results {
                batch.results.push(parse_acquired(result)?);
            }
        }
        if batch.results.len() != wishes.len() {
            return Err(garbled("number of answers"));
        }
        Ok(batch)
    }

    async fn refund(&self, sale: &SaleId, refunds: Vec<Refund>) -> Result<RefundedBatch> {
        let mut batch = RefundedBatch { results: Vec::with_capacity(refunds.len()), before: 0, after: 0 };
        for (index, chunk) in refunds.chunks(CHUNK).enumerate() {
            let args = chunk.iter().flat_map(refund_args).collect();
            let answer: Vec<String> = self.call(&self.scripts.refund, sale, args).await?;
            let [before, after, results @ ..] = answer.as_slice() else { return Err(garbled("answer")) };
            if index == 0 {
                batch.before = int(before)?;
            }
            batch.after = int(after)?;
            for result in results {
                batch.results.push(match result.as_str() {
                    "A" => Refunded::Applied,
                    "I" => Refunded::Ignored,
                    "D" => Refunded::Deferred,
                    _ => return Err(garbled("answer")),
                });
            }
        }
        if batch.results.len() != refunds.len() {
            return Err(garbled("number of answers"));
        }
        Ok(batch)
    }

    async fn persisted(&self, sale: &SaleId, epoch: i64, holds: Vec<HoldId>) -> Result<()> {
        for chunk in holds.chunks(CHUNK) {
            let args = std::iter::once(epoch.to_string()).chain(chunk.iter().map(HoldId::to_string)).collect();
            let _marked: i64 = self.call(&self.scripts.persisted, sale, args).await?;
        }
        Ok(())
    }

    async fn lookup(&self, sale: &SaleId, holds: &[HoldId]) -> Result<Option<Vec<Option<Grant>>>> {
        let mut found = Vec::with_capacity(holds.len());
        for chunk in holds.chunks(CHUNK) {
            let args = chunk.iter().map(HoldId::to_string).collect();
            let answer: Vec<String> = self.call(&self.scripts.lookup, sale, args).await?;
            if answer.len() != chunk.len() {
                return Ok(None);
            }
            for text in &answer {
                found.push(if text.is_empty() { None } else { Some(parse_grant(text)?) });
            }
        }
        Ok(Some(found))
    }

    async fn header(&self, sale: &SaleId) -> Result<Option<Header>> {
        let fields: Vec<String> = self.call(&self.scripts.header, sale, Vec::new()).await?;
        if fields.is_empty() { Ok(None) } else { parse_header(&fields).map(Some) }
    }

    async fn claim(&self, sale: &SaleId, epoch: i64, facts: &Facts, server: &str) -> Result<Claimed> {
        let args = [epoch.to_string(), server.to_owned()].into_iter().chain(facts_args(facts)).collect();
        let there: String = self.call(&self.scripts.claim, sale, args).await?;
        Ok(match int(&there)? {
            0 => Claimed::Yes,
            epoch => Claimed::No(epoch),
        })
    }

    async fn load(&self, sale: &SaleId, epoch: i64, holds: Vec<Held>) -> Result<bool> {
        for chunk in holds.chunks(CHUNK) {
            let mut args = Vec::with_capacity(1 + chunk.len() * 5);
            args.push(epoch.to_string());
            for Held { hold, grant } in chunk {
                let Grant { epoch, quantity, at, buyer } = grant;
                args.extend([
                    hold.to_string(),
                    epoch.to_string(),
                    quantity.to_string(),
                    at.to_string(),
                    buyer.as_str().to_owned(),
                ]);
            }
            let loaded: i64 = self.call(&self.scripts.load, sale, args).await?;
            if loaded == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn open(&self, sale: &SaleId, opening: &Opening) -> Result<bool> {
        let Opening { epoch, available, snapshot_seq, facts } = opening;
        let args = [epoch.to_string(), available.to_string(), snapshot_seq.to_string()];
        let opened: i64 =
            self.call(&self.scripts.open, sale, args.into_iter().chain(facts_args(facts)).collect()).await?;
        Ok(opened == 1)
    }

    async fn clamp(&self, sale: &SaleId, epoch: i64, version: i64, excess: i64) -> Result<Option<i64>> {
        let args = vec![epoch.to_string(), version.to_string(), excess.to_string()];
        let taken: String = self.call(&self.scripts.clamp, sale, args).await?;
        Ok(Some(int(&taken)?).filter(|taken| *taken >= 0))
    }

    async fn raise(&self, sale: &SaleId, raise: &Raise) -> Result<bool> {
        let Raise { epoch, version, offered, missing, release_seq } = raise;
        let args = [epoch, version, offered, missing, release_seq].map(i64::to_string).to_vec();
        let raised: i64 = self.call(&self.scripts.raise, sale, args).await?;
        Ok(raised == 1)
    }

    async fn withdraw(&self, sale: &SaleId, quantity: i64) -> Result<Withdrawn> {
        let answer: String = self.call(&self.scripts.withdraw, sale, vec![quantity.to_string()]).await?;
        match answer.as_str() {
            "D" => Ok(Withdrawn::Done),
            "F" => Ok(Withdrawn::TooFew),
            "U" => Ok(Withdrawn::Unavailable),
            _ => Err(garbled("answer")),
        }
    }

    async fn set_facts(&self, sale: &SaleId, facts: &Facts) -> Result<bool> {
        let told: i64 = self.call(&self.scripts.facts, sale, facts_args(facts).to_vec()).await?;
        Ok(told == 1)
    }

    async fn pending(&self, sale: &SaleId, before: i64, limit: usize) -> Result<Option<Vec<Pending>>> {
        let answer: Vec<String> =
            self.call(&self.scripts.pending, sale, vec![before.to_string(), limit.to_string()]).await?;
        match answer.split_first() {
            Some((code, listed)) if code == "O" => {
                let pairs = listed.chunks_exact(2);
                pairs
                    .map(|pair| Ok(Pending { hold: hold(&pair[0])?, grant: parse_grant(&pair[1])? }))
                    .collect::<Result<_>>()
                    .map(Some)
            }
            Some((code, _)) if code == "N" => Ok(None),
            _ => Err(garbled("answer")),
        }
    }

    async fn buyers(&self, sale: &SaleId) -> Result<Vec<BuyerId>> {
        let buyers: Vec<String> = self.call(&self.scripts.buyers, sale, Vec::new()).await?;
        buyers.iter().map(|buyer| BuyerId::parse(buyer)).collect()
    }

    async fn forget(&self, sale: &SaleId) -> Result<bool> {
        // Not DEL: a million grants are freed beside the server's other work.
        let keys: i64 = self.client.unlink(keys(sale)).await.map_err(fault)?;
        Ok(keys > 0)
    }

    async fn fingerprint(&self) -> Result<String> {
        let server: String = self.client.info(Some(InfoKind::Server)).await.map_err(fault)?;
        let replication: String = self.client.info(Some(InfoKind::Replication)).await.map_err(fault)?;
        let field = |text: &str, name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.map(|value| value.trim().to_owned()).ok_or_else(|| garbled(name))
        };
        // A restart changes the first; a demoted server that took over another's data keeps it and changes the second.
        Ok(format!("{}-{}", field(&server, "run_id")?, field(&replication, "master_replid")?))
    }
}
